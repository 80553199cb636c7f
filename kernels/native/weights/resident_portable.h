/* Groups of the resident form (resident.h) in plain C; see resident_avx512.h. */

typedef struct {
    uint16_t exponent[PM_PALETTE];
} rt;

PM_INLINE rt rt_open(const uint8_t palette[16])
{
    rt tables;
    for (int code = 0; code < PM_PALETTE; code++)
        tables.exponent[code] = (uint16_t)(palette[code] << 7);
    return tables;
}

PM_INLINE void rt_unpack(rt tables, const uint8_t *group, int r, uint16_t *out)
{
    const uint8_t *bytes = group + r * PM_GROUP_COLUMNS;
    const uint8_t *codes = group + PM_GROUP_CODES + r / 2 * PM_GROUP_COLUMNS;
    for (int i = 0; i < PM_GROUP_COLUMNS; i++) {
        const uint16_t plain = (uint16_t)((bytes[i] & 0x80) << 8 | (bytes[i] & 0x7f));
        out[i % 16 / 8 * 32 + i / 16 * 8 + i % 8] =
            plain | tables.exponent[codes[i] >> r % 2 * 4 & 15];
    }
}

typedef struct {
    uint8_t code_of[256]; /* by exponent; PM_PALETTE: none */
} rt_palette;

PM_INLINE rt_palette rt_open_palette(const uint8_t palette[PM_PALETTE])
{
    rt_palette open;
    memset(open.code_of, PM_PALETTE, sizeof open.code_of);
    for (int code = 0; code < PM_PALETTE; code++)
        open.code_of[palette[code]] = (uint8_t)code;
    return open;
}

PM_INLINE void rt_pack(const rt_palette *palette, const uint16_t *const rows[2], uint8_t *bytes,
                       uint8_t *codes, uint64_t missing[2])
{
    missing[0] = missing[1] = 0;
    for (int c = 0; c < PM_GROUP_COLUMNS; c++) {
        const int at = pm_place_of(c);
        int code = 0;
        for (int r = 0; r < 2; r++) {
            const uint16_t weight = rows[r][c];
            const int found = palette->code_of[weight >> 7 & 0xff];
            bytes[r * PM_GROUP_COLUMNS + at] = (uint8_t)((weight >> 8 & 0x80) | (weight & 0x7f));
            code |= (found & (PM_PALETTE - 1)) << 4 * r;
            missing[r] |= (uint64_t)(found == PM_PALETTE) << at;
        }
        codes[at] = (uint8_t)code;
    }
}

PM_INLINE void rt_packed(void) {}
