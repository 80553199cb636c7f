/* Decoding of whole tiles, several at once, from their words to their checksums, for an instruction
 * set whose vectors decode rows. The including file has, beforehand:
 *   lane_states    the states of a tile's lanes; load_lanes, at_rest
 *   hash_lanes     a checksum under way; load_hash, store_hash
 *   decode_tables  what rows look up, by part (see pm_codec_table)
 * and defines, afterwards, what is declared below.
 */

/* A type by the bits of its mantissa: a constant in everything that is inlined. */
enum { TYPE_BF16 = 7, TYPE_F16 = 10, TYPE_E4M3 = 3, TYPE_E5M2 = 2 };
#define ONE_BYTE(type) ((type) < TYPE_BF16)

/* One tile in flight. */
typedef struct {
    lane_states lanes;
    hash_lanes hash;
    const uint8_t *words, *end, *escape, *escape_end;
    const uint8_t *wide, *twos, *ones; /* planes of 8 or 4, 2 and 1 bits, where the type has them */
    uint8_t *out;
    long rows;
    int good;
} flight;

PM_TARGET PM_INLINE decode_tables load_tables(const pm_codec_table *table, int type);
/* A whole row; with its checksum where it is the 64 bytes of a step. */
PM_TARGET PM_INLINE void decode_row(const decode_tables *tables, flight *f, int type);
/* The last row, of `count` < 32 values. */
PM_TARGET PM_INLINE void decode_part(const decode_tables *tables, flight *f, int type, long count);

/* To the next row. */
PM_TARGET PM_INLINE void move_on(flight *f, int type)
{
    /* Four tiles read eight places and write four, which is more than the processor foresees: a tenth
     * faster from memory with AVX2, 3 % with AVX-512 (Zen 5). */
    __builtin_prefetch(f->wide + 1024);
    __builtin_prefetch(f->words + 512);
    __builtin_prefetch(f->out + 1024, 1);
    f->wide += type == TYPE_E4M3 ? 16 : 32;
    f->twos += 8;
    f->ones += 4;
    f->out += ONE_BYTE(type) ? 32 : 64;
}

/* The planes' parts of a row, filled up with zeros. */
typedef struct {
    uint8_t wide[32], twos[8], ones[4];
} row_planes;

PM_TARGET PM_INLINE row_planes part_of_planes(const flight *f, int type, long count)
{
    row_planes part = {{0}, {0}, {0}};
    if (type != TYPE_E5M2)
        memcpy(part.wide, f->wide, (size_t)(type == TYPE_E4M3 ? (count + 1) / 2 : count));
    if (type == TYPE_F16 || type == TYPE_E5M2) {
        memcpy(part.twos, f->twos, (size_t)(count + 3) / 4);
        memcpy(part.ones, f->ones, (size_t)(count + 7) / 8);
    }
    return part;
}

/* Rows that can be decoded without a look at the end of the words. */
PM_TARGET PM_INLINE long safe_rows(const flight *f)
{
    const long safe = (f->end - f->words) / PM_CODEC_ROW_WORDS;
    return safe < f->rows ? safe : f->rows;
}

/* Where the tile's part of each plane begins, of those that the type has. */
typedef struct {
    uint8_t *wide, *twos, *ones;
} plane_parts;

PM_TARGET static plane_parts planes_of(const pm_codec_tile *tile)
{
    const long width = tile->type.mantissa_bits + 1 >= 8 ? 8 : (tile->type.mantissa_bits + 1) & 4;
    uint8_t *twos = tile->planes + (tile->block_values * width + 7) / 8;
    uint8_t *ones = twos + (tile->block_values * 2 + 7) / 8;
    return (plane_parts){tile->planes + tile->first * width / 8, twos + tile->first / 4,
                    ones + tile->first / 8};
}

PM_TARGET static flight take_off(const pm_codec_piece *piece)
{
    const pm_codec_tile *tile = &piece->tile;
    const plane_parts planes = planes_of(tile);
    uint32_t seeds[HASH_LANES];
    for (int i = 0; i < HASH_LANES; i++)
        seeds[i] = (uint32_t)i * HASH_P;
    const uint8_t *words = piece->section + PM_CODEC_STATE_BYTES;
    const uint8_t *end = words + 2 * (long)piece->words;
    return (flight){
        .lanes = load_lanes(piece->section),
        .hash = load_hash(seeds),
        .words = words,
        .end = end,
        .escape = end,
        .escape_end = end + piece->escapes,
        .wide = planes.wide,
        .twos = planes.twos,
        .ones = planes.ones,
        .out = tile->data,
        .rows = tile->values / PM_CODEC_LANES,
        .good = 1,
    };
}

/* The rest of a flight: the rows near the end of the words, the last row if it is not whole, and
 * all checks. */
PM_TARGET PM_INLINE int land(const decode_tables *tables, flight *flying,
                             const pm_codec_piece *piece, int type)
{
    const pm_codec_tile *tile = &piece->tile;
    flight f = *flying;
    uint8_t last[2 * PM_CODEC_ROW_WORDS] = {0};
    uint32_t lanes[HASH_LANES];
    const long rest = tile->values % PM_CODEC_LANES, bytes = tile->values * tile->type.bytes;
    for (long safe; (safe = safe_rows(&f)) > 0; f.rows -= safe)
        for (long i = 0; i < safe; i++)
            decode_row(tables, &f, type);
    if (f.end - f.words > PM_CODEC_ROW_WORDS)
        return -1;
    memcpy(last, f.words, (size_t)(f.end - f.words));
    f.end = last + (f.end - f.words);
    f.words = last;
    for (; f.rows > 0 && f.words <= f.end; f.rows--)
        decode_row(tables, &f, type);
    if (rest > 0 && f.words <= f.end)
        decode_part(tables, &f, type, rest);
    const int good = f.good && f.rows == 0 && f.words == f.end && f.escape == f.escape_end &&
                     at_rest(f.lanes);
    if (!good || !zeros_after(f.escape_end, piece->section) || !planes_filled_up(tile))
        return -1;
    store_hash(lanes, f.hash);
    const uint32_t sum = ONE_BYTE(type) ? checksum(tile->data, bytes) : hash_end(lanes, bytes);
    return sum == piece->checksum ? 0 : -1;
}

PM_TARGET PM_INLINE long least(long a, long b) { return a < b ? a : b; }

/* `count` tiles side by side, until one comes near the end of its words; a constant where this is
 * called, and each tile a variable of its own, so that all of them stay in registers. */
PM_TARGET PM_INLINE void fly(const decode_tables *tables, flight *flights, int count, int type)
{
    flight a = flights[0], b = flights[1], c = flights[2], d = flights[3];
    for (;;) {
        long safe = least(safe_rows(&a), safe_rows(&b));
        if (count > 2)
            safe = least(safe, least(safe_rows(&c), safe_rows(&d)));
        if (safe <= 0)
            break;
        for (long i = 0; i < safe; i++) {
            decode_row(tables, &a, type);
            decode_row(tables, &b, type);
            if (count > 2) {
                decode_row(tables, &c, type);
                decode_row(tables, &d, type);
            }
        }
        a.rows -= safe, b.rows -= safe, c.rows -= safe, d.rows -= safe;
    }
    flights[0] = a, flights[1] = b;
    if (count > 2)
        flights[2] = c, flights[3] = d;
}

PM_TARGET PM_INLINE int decode_type(const pm_codec_decoder *decoder, const pm_codec_piece *pieces,
                                    long count, int type)
{
    const decode_tables tables = load_tables(&decoder->table, type);
    flight flights[PM_CODEC_PIECES];
    int result = 0;
    for (long i = 0; i < PM_CODEC_PIECES; i++)
        flights[i] = take_off(&pieces[least(i, count - 1)]);
    for (long i = 0; i < count; i++)
        if (beyond(pieces[i].tile.type, flights[i].escape, flights[i].escape_end))
            return -1;
    if (count == PM_CODEC_PIECES)
        fly(&tables, flights, PM_CODEC_PIECES, type);
    else if (count > 1)
        fly(&tables, flights, 2, type);
    for (long i = 0; i < count; i++)
        result |= land(&tables, &flights[i], &pieces[i], type);
    return result;
}

PM_TARGET static int decode_tiles(const pm_codec_decoder *decoder, const pm_codec_piece *pieces,
                                  long count)
{
    switch (pieces[0].tile.type.mantissa_bits) {
    case TYPE_BF16: return decode_type(decoder, pieces, count, TYPE_BF16);
    case TYPE_F16: return decode_type(decoder, pieces, count, TYPE_F16);
    case TYPE_E4M3: return decode_type(decoder, pieces, count, TYPE_E4M3);
    default: return decode_type(decoder, pieces, count, TYPE_E5M2);
    }
}
