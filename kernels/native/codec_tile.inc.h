/* One tile of kernels/codec/layout.py in plain C, for the compiler to vectorise. The including file
 * defines PM_TARGET, the attribute of every function. */
#include <stdlib.h>

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

/* Values from exponents and planes; -1 where a plane's last byte is not filled up with zeros. */
PM_TARGET static inline int merge(pm_codec_type type, const pm_codec_tile *tile,
                                  const uint8_t *exponents)
{
    const uint8_t *plane8 = NULL, *plane4 = NULL, *plane2 = NULL, *plane1 = NULL;
    const uint8_t *plane = tile->planes;
    const int rest_bits = type.mantissa_bits + 1;
    for (int width = 8; width > 0; width /= 2)
        if (rest_bits & width) {
            const uint8_t *own = plane + tile->first * width / 8;
            long bits = tile->values * width;
            if (bits % 8 != 0 && own[bits / 8] >> (bits % 8) != 0)
                return -1;
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
    return 0;
}

static const pm_codec_type BF16 = {2, 8, 7}, F16 = {2, 5, 10}, E4M3 = {1, 4, 3}, E5M2 = {1, 5, 2};

PM_TARGET static void split_tile(const pm_codec_tile *tile, uint8_t *exponents)
{
    switch (tile->type.mantissa_bits) {
    case 7: split(BF16, tile, exponents); break;
    case 10: split(F16, tile, exponents); break;
    case 3: split(E4M3, tile, exponents); break;
    default: split(E5M2, tile, exponents);
    }
}

PM_TARGET static int merge_tile(const pm_codec_tile *tile, const uint8_t *exponents)
{
    switch (tile->type.mantissa_bits) {
    case 7: return merge(BF16, tile, exponents);
    case 10: return merge(F16, tile, exponents);
    case 3: return merge(E4M3, tile, exponents);
    default: return merge(E5M2, tile, exponents);
    }
}

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

PM_TARGET static inline long lane_position(long lane)
{
    return lane % (PM_CODEC_LANES / 2) * 2 + lane / (PM_CODEC_LANES / 2);
}

/* Writes the states' words backwards from `end`, and returns where they begin. `symbols` holds
 * whole rows. */
PM_TARGET static uint8_t *encode_rows(const pm_codec_encoder *encoder, const uint8_t *symbols,
                                      long rows, uint32_t *state, uint8_t *end);
/* Exponents to symbols in place; the number of escapes, which go to `escapes`. Both have room for
 * a whole tile. */
PM_TARGET static long find_symbols(const pm_codec_encoder *encoder, uint8_t *symbols, long values,
                                   uint8_t *escapes);

#ifndef PM_CODEC_OWN_ENCODE
PM_TARGET static long find_symbols(const pm_codec_encoder *encoder, uint8_t *symbols, long values,
                                   uint8_t *escapes)
{
    long escaped = 0;
    for (long i = 0; i < values; i++) {
        const uint8_t exponent = symbols[i];
        escapes[escaped] = exponent;
        escaped += encoder->escaped[exponent];
        symbols[i] = encoder->symbol_of[exponent];
    }
    return escaped;
}

PM_TARGET static uint8_t *encode_rows(const pm_codec_encoder *encoder, const uint8_t *symbols,
                                      long rows, uint32_t *state, uint8_t *end)
{
    const pm_codec_table *table = &encoder->table;
    for (long i = 0; i < PM_CODEC_LANES; i++)
        state[i] = PM_CODEC_LOW;
    for (long row = rows - 1; row >= 0; row--)
        for (long lane = PM_CODEC_LANES - 1; lane >= 0; lane--) {
            const int symbol = symbols[row * PM_CODEC_LANES + lane_position(lane)];
            const uint32_t frequency = table->frequencies[symbol];
            uint32_t x = state[lane];
            if (x >> (32 - PM_CODEC_SLOT_BITS) >= frequency) {
                end -= 2;
                *(pm_u16 *)end = (uint16_t)x;
                x >>= 16;
            }
            /* The reciprocal is a little too large, by far less than 1 / x: the quotient is exact. */
            const uint32_t quotient = (uint32_t)((double)x * encoder->reciprocals[symbol]);
            const uint32_t place = encoder->starts[symbol] + x - quotient * frequency;
            state[lane] = (quotient << PM_CODEC_SLOT_BITS) + encoder->slot_of[place];
        }
    return end;
}
#endif

PM_TARGET static long encode_tile(const pm_codec_encoder *encoder, const pm_codec_tile *tile,
                                  uint8_t *section, uint32_t *words, uint32_t *escapes)
{
    uint8_t symbols[PM_CODEC_TILE], found[PM_CODEC_TILE], stream[2 * PM_CODEC_TILE];
    uint32_t state[PM_CODEC_LANES];
    const long rows = (tile->values + PM_CODEC_LANES - 1) / PM_CODEC_LANES;
    split_tile(tile, symbols);
    const long escaped = find_symbols(encoder, symbols, tile->values, found);
    memset(symbols + tile->values, 0, (size_t)(rows * PM_CODEC_LANES - tile->values));
    const uint8_t *begin = encode_rows(encoder, symbols, rows, state, stream + sizeof stream);
    const long stream_bytes = stream + sizeof stream - begin;
    uint8_t *at = section;
    memcpy(at, state, PM_CODEC_STATE_BYTES);
    at += PM_CODEC_STATE_BYTES;
    memcpy(at, begin, (size_t)stream_bytes);
    at += stream_bytes;
    memcpy(at, found, (size_t)escaped);
    at += escaped;
    while ((at - section) % 4 != 0)
        *at++ = 0;
    *words = (uint32_t)(stream_bytes / 2);
    *escapes = (uint32_t)escaped;
    return at - section;
}

/* Whether one of the escapes is no exponent of `type`. */
static int beyond(pm_codec_type type, const uint8_t *escape, const uint8_t *end)
{
    unsigned bits = 0;
    while (escape < end)
        bits |= *escape++;
    return bits >> type.exponent_bits != 0;
}

/* Whether a section, from `end` to the next multiple of four bytes, is zeros. */
static int zeros_after(const uint8_t *end, const uint8_t *section)
{
    int zeros = 1;
    for (; (end - section) % 4 != 0; end++)
        zeros &= *end == 0;
    return zeros;
}

#ifndef PM_CODEC_OWN_DECODE
/* Decodes `rows` rows to table indices; moves `*words`. Reads PM_CODEC_ROW_WORDS bytes per row at
 * most. */
PM_TARGET static void decode_rows(const pm_codec_decoder *decoder, uint32_t *state,
                                  const uint8_t **words, long rows, uint8_t *symbols);
/* Symbols to exponents in place, with the escapes in order; where those end, or NULL: one is
 * missing. There is room for whole rows, of which `values` count. */
PM_TARGET static const uint8_t *show_exponents(const pm_codec_table *table, uint8_t *symbols,
                                               long values, const uint8_t *escape,
                                               const uint8_t *end);

#ifndef PM_CODEC_OWN_ROWS
PM_TARGET static void decode_rows(const pm_codec_decoder *decoder, uint32_t *restrict state,
                                  const uint8_t **words, long rows, uint8_t *restrict symbols)
{
    const uint32_t *restrict slots = decoder->slots;
    const uint8_t *at = *words;
    for (long row = 0; row < rows; row++, symbols += PM_CODEC_LANES)
        for (long lane = 0; lane < PM_CODEC_LANES; lane++) {
            const uint32_t x = state[lane], slot = x % PM_CODEC_SLOTS, says = slots[slot];
            const uint32_t next =
                (says >> 18) * (x >> PM_CODEC_SLOT_BITS) + slot + (says >> 5 & 8191) - 4096;
            /* Without a branch: one lane in six takes a word, and no processor foresees which. */
            const uint32_t low = next < PM_CODEC_LOW, fresh = *(const pm_u16 *)at;
            state[lane] = next << (low * 16) | (fresh & (0u - low));
            at += 2 * low;
            symbols[lane_position(lane)] = says & 31;
        }
    *words = at;
}

PM_TARGET static const uint8_t *show_exponents(const pm_codec_table *table, uint8_t *symbols,
                                               long values, const uint8_t *escape,
                                               const uint8_t *end)
{
    const int escape_symbol = table->has_escape ? table->count - 1 : PM_CODEC_SYMBOLS;
    for (long i = 0; i < values; i++) {
        if (symbols[i] == escape_symbol) {
            if (escape == end)
                return NULL;
            symbols[i] = *escape++;
        } else {
            symbols[i] = table->exponents[symbols[i]];
        }
    }
    return escape;
}
#endif

/* Table indices of a tile's rows; -1 where the words do not fit them. */
PM_TARGET static int decode_symbols(const pm_codec_decoder *decoder, const uint8_t *section,
                                    uint32_t words, long rows, uint8_t *symbols)
{
    uint32_t state[PM_CODEC_LANES];
    memcpy(state, section, sizeof state);
    const uint8_t *at = section + PM_CODEC_STATE_BYTES, *end = at + 2 * (long)words;
    /* As many rows as can be decoded without looking at the end, again and again. */
    for (long safe; rows > 0 && (safe = (end - at) / PM_CODEC_ROW_WORDS) > 0;) {
        safe = safe < rows ? safe : rows;
        decode_rows(decoder, state, &at, safe, symbols);
        rows -= safe;
        symbols += safe * PM_CODEC_LANES;
    }
    uint8_t last[2 * PM_CODEC_ROW_WORDS] = {0};
    const long left = end - at;
    if (left > PM_CODEC_ROW_WORDS)
        return -1;
    memcpy(last, at, (size_t)left);
    at = last;
    end = last + left;
    for (; rows > 0 && at <= end; rows--, symbols += PM_CODEC_LANES)
        decode_rows(decoder, state, &at, 1, symbols);
    int good = rows == 0 && at == end;
    for (long lane = 0; lane < PM_CODEC_LANES; lane++)
        good &= state[lane] == PM_CODEC_LOW;
    return good ? 0 : -1;
}

PM_TARGET static int decode_tile(const pm_codec_decoder *decoder, const pm_codec_piece *piece)
{
    uint8_t symbols[PM_CODEC_TILE];
    const pm_codec_tile *tile = &piece->tile;
    const long rows = (tile->values + PM_CODEC_LANES - 1) / PM_CODEC_LANES;
    if (decode_symbols(decoder, piece->section, piece->words, rows, symbols) != 0)
        return -1;
    const uint8_t *escape = piece->section + PM_CODEC_STATE_BYTES + 2 * (long)piece->words;
    const uint8_t *end = escape + piece->escapes;
    if (beyond(tile->type, escape, end) || !zeros_after(end, piece->section) ||
        show_exponents(&decoder->table, symbols, tile->values, escape, end) != end ||
        merge_tile(tile, symbols) != 0)
        return -1;
    return checksum(tile->data, tile->values * tile->type.bytes) == piece->checksum ? 0 : -1;
}

PM_TARGET static int decode_tiles(const pm_codec_decoder *decoder, const pm_codec_piece *pieces,
                                  long count)
{
    int result = 0;
    for (long i = 0; i < count; i++)
        result |= decode_tile(decoder, &pieces[i]);
    return result;
}
#endif
