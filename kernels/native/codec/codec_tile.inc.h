/* One tile of kernels/codec/layout.py. The including file defines, beforehand:
 *   PM_TARGET            attribute of every function
 *   PM_CODEC_OWN_SPLIT   where it has split_tile itself
 *   PM_CODEC_OWN_ROWS    where it has encode_rows itself
 *   PM_CODEC_OWN_SYMBOLS where it has find_symbols itself
 *   PM_CODEC_OWN_DECODE  where it has decode_tiles itself
 */
#include "codec_values.inc.h"

PM_TARGET static inline long lane_position(long lane)
{
    return lane % (PM_CODEC_LANES / 2) * 2 + lane / (PM_CODEC_LANES / 2);
}

/* Writes the states' words backwards from `end`, and returns where they begin; touches
 * PM_CODEC_BEFORE bytes before them. `symbols` holds whole rows. */
PM_TARGET static uint8_t *encode_rows(const pm_codec_encoder *encoder, const uint8_t *symbols,
                                      long rows, uint32_t *state, uint8_t *end);
/* Exponents to symbols in place; the number of escapes, which go to `escapes`. Both have room for
 * a whole tile. */
PM_TARGET static long find_symbols(const pm_codec_encoder *encoder, uint8_t *symbols, long values,
                                   uint8_t *escapes);

#ifndef PM_CODEC_OWN_SYMBOLS
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
#endif

#ifdef PM_CODEC_OWN_ROWS
/* Frequencies by symbol as dwords, and their reciprocals a little too small; 0 where there is none. */
static void float_reciprocals(const pm_codec_encoder *encoder, uint32_t *frequency,
                              float *reciprocal)
{
    for (int s = 0; s < PM_CODEC_SYMBOLS; s++) {
        frequency[s] = encoder->table.frequencies[s];
        reciprocal[s] = frequency[s] > 0 ? (1.0f - 0x1p-22f) / (float)frequency[s] : 0.0f;
    }
}
#else
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
            /* Without a branch: one lane in six gives a word, and no processor foresees which. */
            const uint32_t full = x >> (32 - PM_CODEC_SLOT_BITS) >= frequency;
            *(pm_u16 *)(end - 2) = (uint16_t)x;
            end -= 2 * full;
            x >>= 16 * full;
            const uint32_t quotient =
                (uint32_t)((uint64_t)x * encoder->reciprocals[symbol] >> PM_CODEC_RECIPROCAL_BITS);
            const uint32_t place = encoder->starts[symbol] + x - quotient * frequency;
            state[lane] = (quotient << PM_CODEC_SLOT_BITS) + encoder->slot_of[place];
        }
    return end;
}
#endif

PM_TARGET static long encode_tile(const pm_codec_encoder *encoder, const pm_codec_tile *tile,
                                  uint8_t *section, uint32_t *words, uint32_t *escapes)
{
    uint8_t symbols[PM_CODEC_TILE], found[PM_CODEC_TILE], stream[2 * PM_CODEC_TILE + PM_CODEC_BEFORE];
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

/* Symbols to exponents in place, with the escapes in order; where those end, or NULL: one is
 * missing. */
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
        !planes_filled_up(tile))
        return -1;
    merge_tile(tile, symbols);
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
