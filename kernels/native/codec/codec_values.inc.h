/* Values of a tile: their checksum, their exponents counted, taken apart and put together, in plain C
 * for the compiler to vectorise. Included by codec_tile.inc.h. */
#include "codec.h"

enum { HASH_LANES = 16 };
static const uint32_t HASH_P = 2654435761u, HASH_Q = 2246822519u;

PM_TARGET static inline uint32_t hash_round(uint32_t state, uint32_t word)
{
    uint32_t mixed = state + word * HASH_Q;
    return (mixed << 13 | mixed >> 19) * HASH_P;
}

PM_TARGET static inline uint32_t hash_end(const uint32_t *lanes, long bytes)
{
    uint32_t sum = (uint32_t)bytes;
    for (int i = 0; i < HASH_LANES; i++)
        sum = hash_round(sum, lanes[i]);
    sum ^= sum >> 15;
    sum *= HASH_Q;
    return sum ^ sum >> 13;
}

PM_TARGET static uint32_t checksum(const uint8_t *data, long bytes)
{
    uint32_t lanes[HASH_LANES], row[HASH_LANES];
    for (int i = 0; i < HASH_LANES; i++)
        lanes[i] = (uint32_t)i * HASH_P;
    long at = 0;
    for (; at + 64 <= bytes; at += 64) {
        memcpy(row, data + at, 64);
        for (int i = 0; i < HASH_LANES; i++)
            lanes[i] = hash_round(lanes[i], row[i]);
    }
    if (at < bytes) {
        memset(row, 0, sizeof row);
        memcpy(row, data + at, (size_t)(bytes - at));
        for (int i = 0; i < HASH_LANES; i++)
            lanes[i] = hash_round(lanes[i], row[i]);
    }
    return hash_end(lanes, bytes);
}

/* Values of `type` as integers, and back. `type` is a constant wherever these are called. */
PM_TARGET static inline uint32_t load_value(pm_codec_type type, const uint8_t *data, long i)
{
    return type.bytes == 2 ? ((const pm_u16 *)data)[i] : data[i];
}

PM_TARGET static inline void store_value(pm_codec_type type, uint8_t *data, long i, uint32_t value)
{
    if (type.bytes == 2)
        ((pm_u16 *)data)[i] = (uint16_t)value;
    else
        data[i] = (uint8_t)value;
}

PM_TARGET static inline uint32_t exponent_of(pm_codec_type type, uint32_t value)
{
    return value >> type.mantissa_bits & ((1u << type.exponent_bits) - 1);
}

/* Sign and mantissa as one number. */
PM_TARGET static inline uint32_t rest_of(pm_codec_type type, uint32_t value)
{
    uint32_t mantissa = value & ((1u << type.mantissa_bits) - 1);
    return value >> (type.exponent_bits + type.mantissa_bits) << type.mantissa_bits | mantissa;
}

PM_TARGET static inline uint32_t whole_of(pm_codec_type type, uint32_t exponent, uint32_t rest)
{
    uint32_t mantissa = rest & ((1u << type.mantissa_bits) - 1);
    return rest >> type.mantissa_bits << (type.exponent_bits + type.mantissa_bits) |
           exponent << type.mantissa_bits | mantissa;
}

/* Exponents and planes of a tile; `exponents` has room for whole groups of 64. */
PM_TARGET static void split_tile(const pm_codec_tile *tile, uint8_t *exponents);

#ifndef PM_CODEC_OWN_SPLIT
/* Writes one plane of `width` bits from bit `shift` of the rests on; the last byte is filled up. */
PM_TARGET static inline void put_plane(pm_codec_type type, const pm_codec_tile *tile, int shift,
                                       int width, uint8_t *restrict plane)
{
    const long values = tile->values, per_byte = 8 / width, whole = values / per_byte;
    const uint8_t *data = tile->data;
    for (long at = 0; at < whole; at++) {
        uint32_t bits = 0;
        for (long j = 0; j < per_byte; j++) {
            uint32_t rest = rest_of(type, load_value(type, data, at * per_byte + j));
            bits |= (rest >> shift & ((1u << width) - 1)) << (j * width);
        }
        plane[at] = (uint8_t)bits;
    }
    if (whole * per_byte < values) {
        uint32_t bits = 0;
        for (long i = whole * per_byte; i < values; i++) {
            uint32_t rest = rest_of(type, load_value(type, data, i));
            bits |= (rest >> shift & ((1u << width) - 1)) << (i % per_byte * width);
        }
        plane[whole] = (uint8_t)bits;
    }
}

PM_TARGET static inline void split(pm_codec_type type, const pm_codec_tile *tile,
                                   uint8_t *restrict exponents)
{
    const uint8_t *data = tile->data;
    uint8_t *plane = tile->planes;
    int shift = 0;
    for (long i = 0, values = tile->values; i < values; i++)
        exponents[i] = (uint8_t)exponent_of(type, load_value(type, data, i));
    for (int width = 8; width > 0; width /= 2)
        if ((type.mantissa_bits + 1) & width) {
            put_plane(type, tile, shift, width, plane + tile->first * width / 8);
            plane += (tile->block_values * width + 7) / 8;
            shift += width;
        }
}
#endif

/* Whether the last byte of each plane of the tile is filled up with zeros. */
static int planes_filled_up(const pm_codec_tile *tile)
{
    const uint8_t *plane = tile->planes;
    for (int width = 8; width > 0; width /= 2)
        if ((tile->type.mantissa_bits + 1) & width) {
            const long bits = (tile->first + tile->values) * width;
            if (bits % 8 != 0 && plane[bits / 8] >> (bits % 8) != 0)
                return 0;
            plane += (tile->block_values * width + 7) / 8;
        }
    return 1;
}

#ifndef PM_CODEC_OWN_DECODE
/* Values from exponents and planes. */
PM_TARGET static inline void merge(pm_codec_type type, const pm_codec_tile *tile,
                                  const uint8_t *exponents)
{
    const uint8_t *plane8 = NULL, *plane4 = NULL, *plane2 = NULL, *plane1 = NULL;
    const uint8_t *plane = tile->planes;
    const int rest_bits = type.mantissa_bits + 1;
    for (int width = 8; width > 0; width /= 2)
        if (rest_bits & width) {
            const uint8_t *own = plane + tile->first * width / 8;
            *(width == 8 ? &plane8 : width == 4 ? &plane4 : width == 2 ? &plane2 : &plane1) = own;
            plane += (tile->block_values * width + 7) / 8;
        }
    uint8_t *restrict data = tile->data;
    for (long i = 0, values = tile->values; i < values; i++) {
        uint32_t rest = 0;
        int shift = 0;
        if (rest_bits & 8)
            rest = plane8[i], shift = 8;
        if (rest_bits & 4)
            rest |= (plane4[i / 2] >> (i % 2 * 4) & 15u) << shift, shift += 4;
        if (rest_bits & 2)
            rest |= (plane2[i / 4] >> (i % 4 * 2) & 3u) << shift, shift += 2;
        if (rest_bits & 1)
            rest |= (plane1[i / 8] >> (i % 8) & 1u) << shift;
        store_value(type, data, i, whole_of(type, exponents[i], rest));
    }
}
#endif

static const pm_codec_type BF16 = {2, 8, 7}, F16 = {2, 5, 10}, E4M3 = {1, 4, 3}, E5M2 = {1, 5, 2};

#ifndef PM_CODEC_OWN_SPLIT
PM_TARGET static void split_tile(const pm_codec_tile *tile, uint8_t *exponents)
{
    switch (tile->type.mantissa_bits) {
    case 7: split(BF16, tile, exponents); break;
    case 10: split(F16, tile, exponents); break;
    case 3: split(E4M3, tile, exponents); break;
    default: split(E5M2, tile, exponents);
    }
}
#endif

#ifndef PM_CODEC_OWN_DECODE
PM_TARGET static void merge_tile(const pm_codec_tile *tile, const uint8_t *exponents)
{
    switch (tile->type.mantissa_bits) {
    case 7: merge(BF16, tile, exponents); break;
    case 10: merge(F16, tile, exponents); break;
    case 3: merge(E4M3, tile, exponents); break;
    default: merge(E5M2, tile, exponents);
    }
}
#endif

/* Four tables: equal neighbours do not wait for each other's count. */
PM_TARGET static inline void count_type(pm_codec_type type, const pm_codec_tile *tile,
                                        uint32_t *histogram)
{
    uint32_t counts[4][256];
    const uint8_t *data = tile->data;
    const long values = tile->values, fours = values / 4 * 4;
    memset(counts, 0, sizeof counts);
    for (long i = 0; i < fours; i += 4)
        for (long j = 0; j < 4; j++)
            counts[j][exponent_of(type, load_value(type, data, i + j))]++;
    for (long i = fours; i < values; i++)
        counts[0][exponent_of(type, load_value(type, data, i))]++;
    for (int e = 0; e < 256; e++)
        histogram[e] += counts[0][e] + counts[1][e] + counts[2][e] + counts[3][e];
}

/* Adds the tile's exponents to histogram[256]. */
PM_TARGET static void count_exponents(const pm_codec_tile *tile, uint32_t *histogram)
{
    switch (tile->type.mantissa_bits) {
    case 7: count_type(BF16, tile, histogram); break;
    case 10: count_type(F16, tile, histogram); break;
    case 3: count_type(E4M3, tile, histogram); break;
    default: count_type(E5M2, tile, histogram);
    }
}
