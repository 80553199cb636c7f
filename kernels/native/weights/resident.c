/* Single rows back from the resident form. */
#include "resident.h"

#include "../forward/phases.h"

void pm_resident_row(const pm_resident *w, long K, long index, uint16_t *out)
{
    const long groups = pm_ceil_div(K, PM_GROUP_COLUMNS), tile = index / PM_TILE_ROWS;
    const long row = index % PM_TILE_ROWS;
    const uint8_t *group = w->tiles + tile * groups * PM_GROUP_BYTES;
    for (long k = 0; k < K; k += PM_GROUP_COLUMNS, group += PM_GROUP_BYTES) {
        const uint8_t *bytes = group + row * PM_GROUP_COLUMNS;
        const uint8_t *codes = group + PM_GROUP_CODES + row / 2 * PM_GROUP_COLUMNS;
        for (int c = 0; c < pm_min(PM_GROUP_COLUMNS, K - k); c++) {
            const int at = pm_place_of(c), code = codes[at] >> row % 2 * 4 & 15;
            out[k + c] = (uint16_t)((bytes[at] & 0x80) << 8 | w->palette[code] << 7 |
                                    (bytes[at] & 0x7f));
        }
    }
    for (uint32_t i = w->starts[tile]; i < w->starts[tile + 1]; i++)
        if ((w->escapes[i] >> 14 & 3) == row) {
            uint16_t *at = out + (w->escapes[i] >> 16) * PM_GROUP_COLUMNS +
                           (w->escapes[i] >> 8 & 63);
            *at = (uint16_t)((*at & 0x807f) | (w->escapes[i] & 0xff) << 7);
        }
}

/* Rows ids[0..count) of a matrix, one after the other. */
PM_API void pm_resident_rows(const pm_resident *w, long K, const int64_t *ids, long count,
                             uint16_t *out)
{
    for (long i = 0; i < count; i++)
        pm_resident_row(w, K, ids[i], out + i * K);
}
