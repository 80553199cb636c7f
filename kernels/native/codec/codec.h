/* Lossless coding of floating-point values; the format is in kernels/codec/layout.py.
 *
 * codec_encode.c and codec_decode.c write and read headers and cut a block into tiles, codec.c picks the
 * instruction set; codec_table.c makes tables;
 * codec_values.inc.h and codec_tile.inc.h code one tile, once per instruction set. Those with vectors
 * decode several tiles at once (codec_flight.inc.h): with AVX-512 by tables in registers, with
 * shuffles of bytes elsewhere (codec_bytes.inc.h, and codec_groups.inc.h where a vector is half a row).
 */
#ifndef PM_CODEC_H
#define PM_CODEC_H

#include <stdint.h>
#include <string.h>

enum {
    PM_CODEC_LANES = 32,
    PM_CODEC_SYMBOLS = 16,
    PM_CODEC_SLOT_BITS = 12,
    PM_CODEC_SLOTS = 1 << PM_CODEC_SLOT_BITS,
    PM_CODEC_BUCKET = PM_CODEC_SLOTS / PM_CODEC_SYMBOLS,
    PM_CODEC_LOW = 1 << 16,
    PM_CODEC_RECIPROCAL_BITS = 32 + PM_CODEC_SLOT_BITS,
    PM_CODEC_TILE = 32768, /* values */
    PM_CODEC_STATE_BYTES = 4 * PM_CODEC_LANES,
    PM_CODEC_ROW_WORDS = 2 * PM_CODEC_LANES, /* bytes that a row reads at most */
    PM_CODEC_PIECES = 4, /* decoded at once, at most */
    PM_CODEC_BEFORE = 16, /* bytes that a step of encoding touches before its words, at most */
    /* Of a tile's section: states, a word and an escape per value, padding. */
    PM_CODEC_SECTION = PM_CODEC_STATE_BYTES + 3 * PM_CODEC_TILE + 4,
};

typedef struct {
    uint8_t bytes, exponent_bits, mantissa_bits;
} pm_codec_type;

/* Symbols of a block and where its slots lie. Index b < 16 is bucket b's own part, 16 + b what
 * belongs to its alias. */
typedef struct {
    int count, has_escape;
    uint8_t exponents[PM_CODEC_SYMBOLS];
    uint16_t frequencies[PM_CODEC_SYMBOLS];
    uint32_t limit[PM_CODEC_SYMBOLS]; /* first slot of bucket b that is the alias's */
    uint8_t part_symbol[2 * PM_CODEC_SYMBOLS];
    int32_t part_offset[2 * PM_CODEC_SYMBOLS]; /* offset minus slot */
} pm_codec_table;

/* What a slot says: frequency (13 bits) << 18 | (offset - slot + 4096) (13 bits) << 5 | symbol. */
typedef struct {
    pm_codec_table table;
    uint32_t slots[PM_CODEC_SLOTS];
} pm_codec_decoder;

typedef struct {
    pm_codec_table table;
    uint8_t symbol_of[256];
    uint8_t escaped[256];
    uint32_t starts[PM_CODEC_SYMBOLS]; /* of a symbol's slots in slot_of */
    uint64_t reciprocals[PM_CODEC_SYMBOLS]; /* 2^44 / frequency, and a little more */
    uint16_t slot_of[PM_CODEC_SLOTS + 2]; /* read two at a time */
} pm_codec_encoder;

/* One tile: `planes` are the block's, `first` is the tile's first value, a multiple of
 * PM_CODEC_TILE. */
typedef struct {
    pm_codec_type type;
    long block_values, first, values;
    uint8_t *planes;
    uint8_t *data;
} pm_codec_tile;

/* A coded tile: its section, which has `words` and `escapes`, and the checksum of what comes out. */
typedef struct {
    pm_codec_tile tile;
    const uint8_t *section;
    uint32_t words, escapes, checksum;
} pm_codec_piece;

typedef struct {
    const char *name;
    int pieces; /* that are best decoded at once */
    int by_slot; /* whether decoding looks at pm_codec_decoder.slots */
    uint32_t (*checksum)(const uint8_t *data, long bytes);
    void (*count)(const pm_codec_tile *tile, uint32_t *histogram);
    /* Writes planes and `section` (PM_CODEC_SECTION bytes); returns the section's bytes. */
    long (*encode)(const pm_codec_encoder *encoder, const pm_codec_tile *tile, uint8_t *section,
                   uint32_t *words, uint32_t *escapes);
    /* 0, or -1 where a piece is damaged. */
    int (*decode)(const pm_codec_decoder *decoder, const pm_codec_piece *pieces, long count);
} pm_codec_kernels;

/* Fills in limits and parts from count and frequencies, which sum to PM_CODEC_SLOTS. */
void pm_codec_place_slots(pm_codec_table *table);
/* Fills in the slots of a table that was placed. */
void pm_codec_fill_decoder(pm_codec_decoder *decoder);
/* For counts[256] of exponents with their sum: the most frequent ones, the lower one first among
 * equals, with one slot at least. */
void pm_codec_choose_table(pm_codec_encoder *encoder, const uint64_t *counts, uint64_t total);

/* The codec of an instruction set, or of the fastest for ""; NULL where the processor lacks it. */
const pm_codec_kernels *pm_codec_find(const char *isa);

extern const pm_codec_kernels pm_codec_portable;
#if defined(__x86_64__)
extern const pm_codec_kernels pm_codec_sse41, pm_codec_avx2, pm_codec_avx512;
#elif defined(__aarch64__) && defined(__ARM_NEON)
extern const pm_codec_kernels pm_codec_neon;
#endif

/* Memory at any address, which may hold anything. */
typedef uint16_t __attribute__((aligned(1), may_alias)) pm_u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) pm_u32;
typedef uint64_t __attribute__((aligned(1), may_alias)) pm_u64;

static inline long pm_codec_planes_bytes(pm_codec_type type, long values)
{
    long bytes = 0;
    for (int width = 8; width > 0; width /= 2)
        if ((type.mantissa_bits + 1) & width)
            bytes += (values * width + 7) / 8;
    return (bytes + 3) / 4 * 4;
}

#endif
