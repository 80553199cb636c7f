/* To the resident form (resident.h): palettes, and tiles by the kernels of an instruction set. */
#ifndef PM_RESIDENT_PACK_H
#define PM_RESIDENT_PACK_H

#include "resident.h"

/* Rows of a matrix that begin with a tile, all of their columns or those of a panel, which begins
 * with a group. */
typedef struct {
    const uint16_t *rows; /* [N][K], ld elements apart */
    long N, K, ld;
    uint8_t *tiles;         /* of the first tile, from the panel's first group on */
    long tile_bytes;        /* from one tile to the next */
    long tile, group;       /* numbers of the first ones in the matrix */
    const uint8_t *palette; /* [PM_PALETTE], ascending */
    uint64_t *keys;         /* room for so many: tile << 32 | escape, ascending within a part */
    long room;
} pm_pack_part;

/* A palette by the upper halves of its exponents: for each of them the codes by the lower half, 0 where
 * there is none. */
typedef struct {
    int count;
    uint8_t upper[PM_PALETTE], codes[PM_PALETTE][16];
} pm_halves;

static inline pm_halves pm_halves_of(const uint8_t palette[PM_PALETTE])
{
    pm_halves found = {0, {0}, {{0}}};
    for (int code = 0; code < PM_PALETTE; code++) {
        const uint8_t upper = palette[code] >> 4; /* ascends with the codes */
        if (found.count == 0 || found.upper[found.count - 1] != upper)
            found.upper[found.count++] = upper;
        found.codes[found.count - 1][palette[code] & 15] = (uint8_t)code;
    }
    return found;
}

/* The 16 most frequent exponents, ascending; of equally frequent ones the lower. */
void pm_palette_by(const long counts[256], uint8_t palette[PM_PALETTE]);

/* Likewise, of about `sample` of the weights. */
void pm_choose_palette(const uint16_t *rows, long N, long K, long ld, long sample,
                       uint8_t palette[PM_PALETTE]);

#endif
