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
