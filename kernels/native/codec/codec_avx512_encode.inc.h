/* Encoding with AVX-512; the part of codec_avx512.c that looks up slots in memory. */

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
    float reciprocal[PM_CODEC_SYMBOLS];
    float_reciprocals(encoder, frequency, reciprocal);
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

/* Takes 32 values apart: their exponents, and what `with_rest` puts together. */
PM_TARGET PM_INLINE __m256i take_apart(const uint8_t *data, int type, uint8_t *wide, uint8_t *twos,
                                       uint8_t *ones)
{
    __mmask32 low, high, sign;
    __m256i exponents;
    if (ONE_BYTE(type)) {
        const __m256i values = _mm256_loadu_si256((const void *)data);
        const __m256i shifted = _mm256_srli_epi16(values, (unsigned)type);
        exponents = _mm256_and_si256(shifted, _mm256_set1_epi8(type == TYPE_E4M3 ? 15 : 31));
        if (type == TYPE_E4M3) {
            const __m256i mantissa = _mm256_and_si256(values, _mm256_set1_epi8(7));
            const __m256i above =
                _mm256_and_si256(_mm256_srli_epi16(values, 4), _mm256_set1_epi8(8));
            /* Pairs of four bits to a byte: the second times 16. */
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_or_si256(mantissa, above),
                                                       _mm256_set1_epi16(0x1001));
            _mm_storeu_si128((void *)wide, _mm256_cvtepi16_epi8(pairs));
            return exponents;
        }
        low = _mm256_test_epi8_mask(values, _mm256_set1_epi8(1));
        high = _mm256_test_epi8_mask(values, _mm256_set1_epi8(2));
        sign = _mm256_movepi8_mask(values);
    } else {
        const __m512i values = _mm512_loadu_si512(data);
        const __m512i shifted = _mm512_srli_epi16(values, (unsigned)type);
        sign = _mm512_movepi16_mask(values);
        if (type == TYPE_BF16) {
            const __m512i above = _mm512_and_si512(_mm512_srli_epi16(values, 8),
                                                   _mm512_set1_epi16(0x80));
            const __m512i rest = _mm512_ternarylogic_epi32(
                above, values, _mm512_set1_epi16(0x7f), 0xf8); /* above | (values & 0x7f) */
            _mm256_storeu_si256((void *)wide, _mm512_cvtepi16_epi8(rest));
            return _mm512_cvtepi16_epi8(shifted);
        }
        _mm256_storeu_si256((void *)wide, _mm512_cvtepi16_epi8(values));
        exponents =
            _mm512_cvtepi16_epi8(_mm512_and_si512(shifted, _mm512_set1_epi16(31)));
        low = _mm512_test_epi16_mask(values, _mm512_set1_epi16(0x100));
        high = _mm512_test_epi16_mask(values, _mm512_set1_epi16(0x200));
    }
    *(pm_u64 *)twos =
        _pdep_u64(low, 0x5555555555555555) | _pdep_u64(high, 0xaaaaaaaaaaaaaaaa);
    *(pm_u32 *)ones = sign;
    return exponents;
}

PM_TARGET PM_INLINE void split_type(const pm_codec_tile *tile, uint8_t *exponents, int type)
{
    const plane_parts planes = planes_of(tile);
    const long whole = tile->values / 32 * 32, rest = tile->values - whole;
    const long wide_row = type == TYPE_E4M3 ? 16 : 32, bytes = tile->type.bytes;
    for (long at = 0, row = 0; at < whole; at += 32, row++)
        _mm256_storeu_si256((void *)(exponents + at),
                            take_apart(tile->data + at * bytes, type, planes.wide + row * wide_row,
                                       planes.twos + 8 * row, planes.ones + 4 * row));
    if (rest == 0)
        return;
    uint8_t data[64] = {0}, wide[32], twos[8], ones[4];
    memcpy(data, tile->data + whole * bytes, (size_t)(rest * bytes));
    _mm256_storeu_si256((void *)(exponents + whole), take_apart(data, type, wide, twos, ones));
    if (type != TYPE_E5M2)
        memcpy(planes.wide + whole / 32 * wide_row, wide,
               (size_t)(type == TYPE_E4M3 ? (rest + 1) / 2 : rest));
    if (type == TYPE_F16 || type == TYPE_E5M2) {
        memcpy(planes.twos + whole / 4, twos, (size_t)(rest + 3) / 4);
        memcpy(planes.ones + whole / 8, ones, (size_t)(rest + 7) / 8);
    }
}

PM_TARGET static void split_tile(const pm_codec_tile *tile, uint8_t *exponents)
{
    switch (tile->type.mantissa_bits) {
    case TYPE_BF16: split_type(tile, exponents, TYPE_BF16); break;
    case TYPE_F16: split_type(tile, exponents, TYPE_F16); break;
    case TYPE_E4M3: split_type(tile, exponents, TYPE_E4M3); break;
    default: split_type(tile, exponents, TYPE_E5M2);
    }
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
