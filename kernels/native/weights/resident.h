/* The resident form of a bfloat16 matrix: 12 bits a weight, the same bits when read.
 *
 * Rows in tiles of 4, columns in groups of 64. A group of a tile is 384 bytes, one after the other as
 * the product reads them, so a tile is one stream:
 *   [4][64] sign and mantissa of a weight, s << 7 | m;
 *   [2][64] codes: of rows 0 and 1, then of rows 2 and 3; the lower row's in the low 4 bits.
 * Column c of a group is byte c / 8 % 4 * 16 + c / 32 * 8 + c % 8 of its 64: an interleaving of bytes
 * within 16 byte lanes then yields columns in order.
 *
 * A code is the place of the exponent in the matrix's palette of 16. Weights with another exponent are
 * escapes: listed by tile, by group within it, and put in place before anything is multiplied. Rows
 * and columns beyond the matrix have zero bytes.
 *
 * Internal memory of one process, made by resident_pack.c and resident_parts.c only: nothing here is read from outside.
 */
#ifndef PM_RESIDENT_H
#define PM_RESIDENT_H

#include <stdint.h>

enum {
    PM_TILE_ROWS = 4,
    PM_GROUP_COLUMNS = 64,
    PM_GROUP_CODES = PM_TILE_ROWS * PM_GROUP_COLUMNS, /* where the codes begin */
    PM_GROUP_BYTES = PM_GROUP_CODES * 3 / 2,
    PM_PALETTE = 16,
};

typedef struct {
    const uint8_t *tiles;    /* [ceil(N / 4)][ceil(K / 64)][PM_GROUP_BYTES], 64-byte aligned */
    const uint32_t *starts;  /* [ceil(N / 4) + 1]: of a tile's escapes */
    const uint32_t *escapes; /* group << 16 | row << 14 | column << 8 | exponent */
    uint8_t palette[PM_PALETTE];
} pm_resident;

/* Where a column is among the 64 bytes of its row. */
static inline int pm_place_of(long column)
{
    return (int)(column / 8 % 4 * 16 + column / 32 * 8 + column % 8);
}

/* Puts one escape in its place among 4 rows of a group, `ld` apart. */
static inline void pm_put_escape(uint32_t escape, uint16_t *group, long ld)
{
    uint16_t *at = group + (escape >> 14 & 3) * ld + (escape >> 8 & 63);
    *at = (uint16_t)((*at & 0x807f) | (escape & 0xff) << 7);
}

/* Row `index` of a matrix of K columns, as it was. */
void pm_resident_row(const pm_resident *w, long K, long index, uint16_t *out);

#endif
