/* Tiles of the resident form from rows in 16 bits, by the rt_pack of an instruction set.
 *
 * Roofline: 2 bytes a weight are read and 1.5 written past the caches, for half an operation on vectors
 * of 64 (a look-up per upper half of the palette's exponents finds a code). Measured on one Zen 5 core, of
 * bytes read: 18 GB/s from memory, 38 of what was just decoded.
 */

/* Weights from one that is packed to one that is fetched. What was read from the drive and hashed is
 * not in the nearer caches any more: without, 5 GB/s. In the order of memory: row by row, 10 GB/s. */
enum { PM_PACK_AHEAD = 4096 };

/* Lists the escapes of a row of a group; bit i of `missing` is byte i of its 64. */
static long list_escapes(const pm_pack_part *part, long tile, long group, long r, const uint16_t *row,
                         long n, uint64_t missing, long found)
{
    for (long c = 0; c < n; c++)
        if (missing >> pm_place_of(c) & 1) {
            if (found < part->room)
                part->keys[found] = (uint64_t)tile << 32 | (uint64_t)group << 16 |
                                    (uint64_t)(r << 14 | c << 8 | (row[c] >> 7 & 0xff));
            found++;
        }
    return found;
}

/* Group `group` of a tile that begins with row n; returns the number of escapes with those before. */
PM_INLINE long pack_group(const rt_palette *palette, const pm_pack_part *part, long n, long group,
                          uint8_t *out, long found)
{
    const long k = group * PM_GROUP_COLUMNS, columns = pm_min(PM_GROUP_COLUMNS, part->K - k);
    for (long r = 0; r < PM_TILE_ROWS; r += 2) {
        const uint16_t *rows[2];
        uint16_t padded[2][PM_GROUP_COLUMNS];
        uint64_t missing[2];
        long valid[2];
        for (long i = 0; i < 2; i++) {
            valid[i] = n + r + i < part->N ? columns : 0;
            rows[i] = part->rows + (n + r + i) * part->ld + k;
            if (valid[i] < PM_GROUP_COLUMNS) {
                memset(padded[i], 0, sizeof padded[i]);
                if (valid[i] > 0)
                    memcpy(padded[i], rows[i], (size_t)valid[i] * sizeof *rows[i]);
                rows[i] = padded[i];
            }
        }
        rt_pack(palette, rows, out + r * PM_GROUP_COLUMNS,
                out + PM_GROUP_CODES + r / 2 * PM_GROUP_COLUMNS, missing);
        for (long i = 0; i < 2; i++)
            if (__builtin_expect(missing[i] != 0, 0))
                found = list_escapes(part, part->tile + n / PM_TILE_ROWS, part->group + group, r + i,
                                     rows[i], valid[i], missing[i], found);
    }
    return found;
}

/* Fills the tiles of `part`. Returns its number of escapes, of which those are listed that there is
 * room for. */
PM_TARGET static long pack_part(const pm_pack_part *part)
{
    const rt_palette palette = rt_open_palette(part->palette);
    const long groups = pm_ceil_div(part->K, PM_GROUP_COLUMNS);
    long found = 0;
    for (long n = 0; n < part->N; n += PM_TILE_ROWS) {
        const uint16_t *ahead = part->rows + n * part->ld + PM_PACK_AHEAD;
        uint8_t *out = part->tiles + n / PM_TILE_ROWS * part->tile_bytes;
        for (long g = 0; g < groups; g++, out += PM_GROUP_BYTES) {
            for (int line = 0; line < 8; line++, ahead += 32)
                __builtin_prefetch(ahead);
            found = pack_group(&palette, part, n, g, out, found);
        }
    }
    rt_packed();
    return found;
}
