/* The codec for x86-64 processors with AVX-512 (F, BW, VL, DQ).
 *
 * Decoding keeps all tables in registers: a row of 32 lanes is two vectors, of even and of odd
 * positions, whose results an "or" brings into order. A step of a lane waits some 40 cycles for the
 * one before, so several tiles are decoded at once (measured on Zen 5, GB/s of bfloat16: one tile
 * ONE, two TWO).
 */
#if defined(__x86_64__)
#include <immintrin.h>

#define PM_TARGET __attribute__((target("avx2,bmi2,popcnt,lzcnt,avx512f,avx512bw,avx512vl,"   \
                                        "avx512dq")))
#define PM_INLINE static inline __attribute__((always_inline))
#define PM_CODEC_OWN_DECODE
#define PM_CODEC_OWN_ENCODE
#include "codec_tile.inc.h"

/* Tables by part (see pm_codec_table): in dwords, the own ones and the aliases'. */
typedef struct {
    __m512i last; /* by bucket: its last own slot << 20, and ones below */
    __m512i factor[2]; /* frequency - 4096 */
    __m512i offset[2];
    __m512i shown[2]; /* exponent, where it goes; with the bit `flag` for the escape */
} decode_tables;

/* One tile in flight. */
typedef struct {
    __m512i even, odd, hash;
    const uint8_t *words, *end, *escape, *escape_end, *plane;
    uint8_t *out;
    long rows;
    int good;
} flight;

/* Exponents appear shifted left by `shift`; the escape as `flag`. */
PM_TARGET static decode_tables load_tables(const pm_codec_table *table, int shift, uint32_t flag)
{
    uint32_t last[16], factor[32], offset[32], shown[32];
    for (int part = 0; part < 32; part++) {
        const int symbol = table->part_symbol[part];
        const int escape = table->has_escape && symbol == table->count - 1;
        factor[part] = (uint32_t)table->frequencies[symbol] - PM_CODEC_SLOTS;
        offset[part] = (uint32_t)table->part_offset[part];
        shown[part] = escape ? flag : (uint32_t)table->exponents[symbol] << shift;
    }
    for (int bucket = 0; bucket < 16; bucket++) /* a limit is never 0: every symbol has a slot */
        last[bucket] = (table->limit[bucket] << 20) - 1;
    return (decode_tables){
        _mm512_loadu_si512(last),
        {_mm512_loadu_si512(factor), _mm512_loadu_si512(factor + 16)},
        {_mm512_loadu_si512(offset), _mm512_loadu_si512(offset + 16)},
        {_mm512_loadu_si512(shown), _mm512_loadu_si512(shown + 16)},
    };
}

/* One step of 16 lanes: what is shown of their symbols; moves the states and `*words`. */
PM_TARGET PM_INLINE __m512i step(const decode_tables *tables, __m512i *state, const uint8_t **words)
{
    const __m512i x = *state;
    const __m512i bucket = _mm512_srli_epi32(x, 8); /* permutations look at its low four bits */
    const __mmask16 alias = _mm512_cmpgt_epu32_mask(
        _mm512_slli_epi32(x, 20), _mm512_permutexvar_epi32(bucket, tables->last));
    __m512i part = _mm512_and_si512(bucket, _mm512_set1_epi32(15));
    part = _mm512_mask_or_epi32(part, alias, part, _mm512_set1_epi32(16));
    const __m512i factor =
        _mm512_permutex2var_epi32(tables->factor[0], part, tables->factor[1]);
    const __m512i offset =
        _mm512_permutex2var_epi32(tables->offset[0], part, tables->offset[1]);
    const __m512i shown = _mm512_permutex2var_epi32(tables->shown[0], part, tables->shown[1]);
    /* frequency (x / 4096) + x mod 4096 = x + (frequency - 4096) (x / 4096) */
    const __m512i product = _mm512_mullo_epi32(factor, _mm512_srli_epi32(x, PM_CODEC_SLOT_BITS));
    const __m512i next = _mm512_add_epi32(_mm512_add_epi32(x, offset), product);
    const __mmask16 low = _mm512_cmplt_epu32_mask(next, _mm512_set1_epi32(PM_CODEC_LOW));
    const __m512i fresh = _mm512_maskz_expand_epi32(
        low, _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)*words)));
    *state = _mm512_mask_or_epi32(next, low, _mm512_slli_epi32(next, 16), fresh);
    *words += 2 * _mm_popcnt_u32(low);
    return shown;
}

/* The escapes of the marked positions, in order; `row` has words or bytes. */
PM_TARGET PM_INLINE __m512i put_escapes(__m512i row, __mmask32 escaped, flight *f, int bf16)
{
    while (__builtin_expect(escaped != 0, 0)) {
        if (f->escape == f->escape_end) {
            f->good = 0;
            break;
        }
        const __mmask32 first = escaped & -escaped;
        const uint8_t exponent = *f->escape++;
        row = bf16 ? _mm512_mask_set1_epi16(row, first, (short)(exponent << 7))
                   : _mm512_mask_set1_epi8(row, first, (char)exponent);
        escaped -= first;
    }
    return row;
}

/* The positions `valid` of a row: exponents of bfloat16 where they go, or as bytes below. */
PM_TARGET PM_INLINE __m512i exponents_of_row(const decode_tables *tables, flight *f, int bf16,
                                             __mmask32 valid)
{
    const __m512i even = step(tables, &f->even, &f->words);
    const __m512i odd = step(tables, &f->odd, &f->words);
    if (bf16) {
        const __m512i row = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        return put_escapes(row, _mm512_movepi16_mask(row) & valid, f, 1);
    }
    const __m256i row = _mm512_cvtepi32_epi16(_mm512_or_si512(even, _mm512_slli_epi32(odd, 8)));
    return put_escapes(_mm512_castsi256_si512(row), _mm256_movepi8_mask(row) & valid, f, 0);
}

PM_TARGET PM_INLINE __m512i with_rest(__m512i row, __m256i rest)
{
    /* Each byte twice in a word: the sign is in place in one, the mantissa in the other. */
    const __m512i twice = _mm512_shuffle_epi8(
        _mm512_cvtepu8_epi16(rest),
        _mm512_set4_epi32(0x0e0e0c0c, 0x0a0a0808, 0x06060404, 0x02020000));
    /* row | (twice & mask) */
    return _mm512_ternarylogic_epi32(row, twice, _mm512_set1_epi16((short)0x807f), 0xf8);
}

PM_TARGET PM_INLINE __m512i hash_step(__m512i hash, __m512i row)
{
    const __m512i spread = _mm512_mullo_epi32(row, _mm512_set1_epi32((int)HASH_Q));
    const __m512i mixed = _mm512_rol_epi32(_mm512_add_epi32(hash, spread), 13);
    return _mm512_mullo_epi32(mixed, _mm512_set1_epi32((int)HASH_P));
}

/* A whole row: of bfloat16, with its checksum; or of exponents. */
PM_TARGET PM_INLINE void decode_row(const decode_tables *tables, flight *f, int bf16)
{
    __m512i row = exponents_of_row(tables, f, bf16, 0xffffffff);
    if (bf16) {
        row = with_rest(row, _mm256_loadu_si256((const void *)f->plane));
        f->hash = hash_step(f->hash, row);
        _mm512_storeu_si512(f->out, row);
        f->plane += PM_CODEC_LANES;
        f->out += 64;
    } else {
        _mm256_storeu_si256((void *)f->out, _mm512_castsi512_si256(row));
        f->out += 32;
    }
}

/* The last row, of the positions `valid` alone. */
PM_TARGET static void decode_part(const decode_tables *tables, flight *f, int bf16, __mmask32 valid)
{
    __m512i row = exponents_of_row(tables, f, bf16, valid);
    if (bf16) {
        row = with_rest(row, _mm256_maskz_loadu_epi8(valid, f->plane));
        f->hash = hash_step(f->hash, _mm512_maskz_mov_epi16(valid, row));
        _mm512_mask_storeu_epi16(f->out, valid, row);
    } else {
        _mm256_mask_storeu_epi8(f->out, valid, _mm512_castsi512_si256(row));
    }
}

/* Rows that can be decoded without a look at the end of the words. */
PM_TARGET PM_INLINE long safe_rows(const flight *f)
{
    const long safe = (f->end - f->words) / PM_CODEC_ROW_WORDS;
    return safe < f->rows ? safe : f->rows;
}

PM_TARGET static flight take_off(const pm_codec_piece *piece, uint8_t *out)
{
    uint32_t seeds[HASH_LANES];
    for (int i = 0; i < HASH_LANES; i++)
        seeds[i] = (uint32_t)i * HASH_P;
    const uint8_t *words = piece->section + PM_CODEC_STATE_BYTES;
    const uint8_t *end = words + 2 * (long)piece->words;
    return (flight){
        _mm512_loadu_si512(piece->section), _mm512_loadu_si512(piece->section + 64),
        _mm512_loadu_si512(seeds), words, end, end, end + piece->escapes,
        piece->tile.planes + piece->tile.first, out,
        piece->tile.values / PM_CODEC_LANES, 1};
}

/* The rest of a flight: the rows near the end of the words, the last row if it is not whole, and
 * all checks but that of the result. */
PM_TARGET static int land(const decode_tables *tables, flight *flying, const pm_codec_piece *piece,
                          int bf16)
{
    flight f = *flying;
    uint8_t last[2 * PM_CODEC_ROW_WORDS] = {0};
    const long rest = piece->tile.values % PM_CODEC_LANES;
    for (long safe; (safe = safe_rows(&f)) > 0; f.rows -= safe)
        for (long i = 0; i < safe; i++)
            decode_row(tables, &f, bf16);
    if (f.end - f.words > PM_CODEC_ROW_WORDS)
        return -1;
    memcpy(last, f.words, (size_t)(f.end - f.words));
    f.end = last + (f.end - f.words);
    f.words = last;
    for (; f.rows > 0 && f.words <= f.end; f.rows--)
        decode_row(tables, &f, bf16);
    if (rest > 0 && f.words <= f.end)
        decode_part(tables, &f, bf16, (1u << rest) - 1);
    const __m512i wrong = _mm512_or_si512(_mm512_xor_si512(f.even, _mm512_set1_epi32(PM_CODEC_LOW)),
                                          _mm512_xor_si512(f.odd, _mm512_set1_epi32(PM_CODEC_LOW)));
    const int good = f.good && f.rows == 0 && f.words == f.end && f.escape == f.escape_end &&
                     _mm512_test_epi32_mask(wrong, wrong) == 0;
    *flying = f;
    return good && zeros_after(f.escape_end, piece->section) ? 0 : -1;
}

PM_TARGET static int finish_bf16(const decode_tables *tables, flight *f,
                                 const pm_codec_piece *piece)
{
    uint32_t lanes[HASH_LANES];
    if (land(tables, f, piece, 1) != 0)
        return -1;
    _mm512_storeu_si512(lanes, f->hash);
    return hash_end(lanes, 2 * piece->tile.values) == piece->checksum ? 0 : -1;
}

static long least(long a, long b) { return a < b ? a : b; }

/* `count` tiles side by side, until one comes near the end of its words; a constant where this is
 * called, and each tile a variable of its own, so that all of them stay in registers. */
PM_TARGET PM_INLINE void fly(const decode_tables *tables, flight *flights, int count)
{
    flight a = flights[0], b = flights[1], c = flights[2], d = flights[3];
    for (;;) {
        long safe = least(safe_rows(&a), safe_rows(&b));
        if (count > 2)
            safe = least(safe, least(safe_rows(&c), safe_rows(&d)));
        if (safe <= 0)
            break;
        for (long i = 0; i < safe; i++) {
            decode_row(tables, &a, 1);
            decode_row(tables, &b, 1);
            if (count > 2) {
                decode_row(tables, &c, 1);
                decode_row(tables, &d, 1);
            }
        }
        a.rows -= safe, b.rows -= safe, c.rows -= safe, d.rows -= safe;
    }
    flights[0] = a, flights[1] = b;
    if (count > 2)
        flights[2] = c, flights[3] = d;
}

PM_TARGET static int decode_bf16(const pm_codec_decoder *decoder, const pm_codec_piece *pieces,
                                 long count)
{
    const decode_tables tables = load_tables(&decoder->table, 7, 0x8000);
    flight flights[PM_CODEC_PIECES];
    int result = 0;
    for (long i = 0; i < PM_CODEC_PIECES; i++)
        flights[i] = take_off(&pieces[least(i, count - 1)], pieces[least(i, count - 1)].tile.data);
    if (count == PM_CODEC_PIECES)
        fly(&tables, flights, PM_CODEC_PIECES);
    else if (count > 1)
        fly(&tables, flights, 2);
    for (long i = 0; i < count; i++)
        result |= finish_bf16(&tables, &flights[i], &pieces[i]);
    return result;
}

/* Any other type: exponents first, then they are put together with the planes. */
PM_TARGET static int decode_other(const pm_codec_decoder *decoder, const pm_codec_piece *piece)
{
    uint8_t exponents[PM_CODEC_TILE];
    const pm_codec_tile *tile = &piece->tile;
    const decode_tables tables = load_tables(&decoder->table, 0, 0x80);
    flight f = take_off(piece, exponents);
    if (beyond(tile->type, f.escape, f.escape_end) || land(&tables, &f, piece, 0) != 0 || merge_tile(tile, exponents) != 0)
        return -1;
    return checksum(tile->data, tile->values * tile->type.bytes) == piece->checksum ? 0 : -1;
}

PM_TARGET static int decode_tiles(const pm_codec_decoder *decoder, const pm_codec_piece *pieces,
                                  long count)
{
    int result = 0;
    if (pieces[0].tile.type.mantissa_bits == BF16.mantissa_bits)
        return decode_bf16(decoder, pieces, count);
    for (long i = 0; i < count; i++)
        result |= decode_other(decoder, &pieces[i]);
    return result;
}

/* ---- encoding ---- */

typedef struct {
    __m512i frequency, start;
    __m512 reciprocal; /* a little too small, so that a quotient is right or one too small */
    const uint16_t *slot_of;
} encode_tables;

/* One step of 16 lanes, backwards: their words go to where `*end` moves. */
PM_TARGET PM_INLINE void push(const encode_tables *tables, __m512i *state, __m512i symbol,
                              uint8_t **end)
{
    __m512i x = *state;
    const __m512i frequency = _mm512_permutexvar_epi32(symbol, tables->frequency);
    const __mmask16 full =
        _mm512_cmpge_epu32_mask(_mm512_srli_epi32(x, 32 - PM_CODEC_SLOT_BITS), frequency);
    const unsigned count = (unsigned)_mm_popcnt_u32(full);
    *end -= 2 * count;
    _mm256_mask_storeu_epi16(*end, (__mmask16)_bzhi_u32(0xffff, count),
                             _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, x)));
    x = _mm512_mask_srli_epi32(x, full, x, 16);
    /* x / frequency < 2^20: roundings and the reciprocal's bias make less than half of one. */
    __m512i quotient = _mm512_cvttps_epi32(_mm512_mul_ps(
        _mm512_cvtepu32_ps(x), _mm512_permutexvar_ps(symbol, tables->reciprocal)));
    __m512i left = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, frequency));
    const __mmask16 short_of = _mm512_cmpge_epu32_mask(left, frequency);
    quotient = _mm512_mask_add_epi32(quotient, short_of, quotient, _mm512_set1_epi32(1));
    left = _mm512_mask_sub_epi32(left, short_of, left, frequency);
    const __m512i place =
        _mm512_add_epi32(_mm512_permutexvar_epi32(symbol, tables->start), left);
    const __m512i slot = _mm512_and_si512(_mm512_i32gather_epi32(place, tables->slot_of, 2),
                                          _mm512_set1_epi32(0xffff));
    *state = _mm512_add_epi32(_mm512_slli_epi32(quotient, PM_CODEC_SLOT_BITS), slot);
}

PM_TARGET static uint8_t *encode_rows(const pm_codec_encoder *encoder, const uint8_t *symbols,
                                      long rows, uint32_t *state, uint8_t *end)
{
    uint32_t frequency[PM_CODEC_SYMBOLS];
    float reciprocal[PM_CODEC_SYMBOLS] = {0};
    for (int s = 0; s < PM_CODEC_SYMBOLS; s++) {
        frequency[s] = encoder->table.frequencies[s];
        if (frequency[s] > 0)
            reciprocal[s] = (1.0f - 0x1p-22f) / (float)frequency[s];
    }
    const encode_tables tables = {_mm512_loadu_si512(frequency),
                                  _mm512_loadu_si512(encoder->starts),
                                  _mm512_loadu_ps(reciprocal), encoder->slot_of};
    __m512i even = _mm512_set1_epi32(PM_CODEC_LOW), odd = even;
    for (long row = rows - 1; row >= 0; row--) {
        const __m512i pair = _mm512_cvtepu16_epi32(
            _mm256_loadu_si256((const void *)(symbols + row * PM_CODEC_LANES)));
        push(&tables, &odd, _mm512_srli_epi32(pair, 8), &end);
        push(&tables, &even, _mm512_and_si512(pair, _mm512_set1_epi32(255)), &end);
    }
    _mm512_storeu_si512(state, even);
    _mm512_storeu_si512(state + 16, odd);
    return end;
}

/* Exponents to symbols in place, 64 at a time; the number of escapes, which go to `escapes`. The
 * memory of both goes on to a multiple of 64. */
PM_TARGET static long find_symbols(const pm_codec_encoder *encoder, uint8_t *symbols, long values,
                                   uint8_t *escapes)
{
    const pm_codec_table *table = &encoder->table;
    const int shown = table->count - table->has_escape;
    long escaped = 0;
    for (long at = 0; at < values; at += 64) {
        const __m512i exponents = _mm512_loadu_si512(symbols + at);
        __m512i found = _mm512_setzero_si512();
        __mmask64 other = values - at < 64 ? _bzhi_u64(~0ull, (unsigned)(values - at)) : ~0ull;
        for (int s = 0; s < shown; s++) {
            const __mmask64 same =
                _mm512_cmpeq_epi8_mask(exponents, _mm512_set1_epi8((char)table->exponents[s]));
            found = _mm512_mask_mov_epi8(found, same, _mm512_set1_epi8((char)s));
            other &= ~same;
        }
        found = _mm512_mask_mov_epi8(found, other, _mm512_set1_epi8((char)shown));
        for (; other != 0; other &= other - 1)
            escapes[escaped++] = symbols[at + __builtin_ctzll(other)];
        _mm512_storeu_si512(symbols + at, found);
    }
    return escaped;
}

const pm_codec_kernels pm_codec_avx512 = {
    .name = "avx512",
    .pieces = PM_CODEC_PIECES,
    .checksum = checksum,
    .count = count_exponents,
    .encode = encode_tile,
    .decode = decode_tiles,
};
#endif
