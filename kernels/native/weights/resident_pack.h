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

/* A palette that the first part of a matrix chooses for all. */
typedef struct {
    int chosen;
    uint8_t exponents[PM_PALETTE];
} pm_palette;

/* The 16 most frequent exponents of about `sample` of the weights, ascending; of equally frequent ones
 * the lower. */
void pm_choose_palette(const uint16_t *rows, long N, long K, long ld, long sample,
                       uint8_t palette[PM_PALETTE]);

#endif
