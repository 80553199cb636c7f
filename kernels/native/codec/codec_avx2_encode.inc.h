/* Encoding with AVX2: the part of codec_avx2.c that looks up slots in memory. A row is four vectors of
 * eight lanes, which do not wait for each other. */

/* By symbol, in two halves of eight; the reciprocal a little too small, so that a quotient is right or
 * one too small. */
typedef struct {
    __m256i frequency[2], start[2];
    __m256 reciprocal[2];
    const uint16_t *slot_of;
} encode_tables;

/* The entries of a table of 16 for eight symbols. */
PM_TARGET PM_INLINE __m256i entries(const __m256i table[2], __m256i symbol)
{
    const __m256 low = (__m256)_mm256_permutevar8x32_epi32(table[0], symbol);
    const __m256 high = (__m256)_mm256_permutevar8x32_epi32(table[1], symbol);
    return (__m256i)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(symbol, 28));
}

/* x < 2^32 as a float, rounded once. */
PM_TARGET PM_INLINE __m256 to_float(__m256i x)
{
    const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
    const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)));
    return _mm256_add_ps(_mm256_mul_ps(high, _mm256_set1_ps(65536.0f)), low);
}

/* One step of eight lanes, backwards: their words go to where `*end` moves. */
PM_TARGET PM_INLINE void push(const encode_tables *tables, __m256i *state, const uint8_t *symbols,
                              uint8_t **end)
{
    const __m256i symbol = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)symbols));
    const __m256i one = _mm256_set1_epi32(1), frequency = entries(tables->frequency, symbol);
    __m256i x = *state;
    const __m256i full = _mm256_cmpgt_epi32(_mm256_srli_epi32(x, 32 - PM_CODEC_SLOT_BITS),
                                            _mm256_sub_epi32(frequency, one));
    const uint32_t set = (uint32_t)_mm256_movemask_ps((__m256)full);
    const __m256i words = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    const __m128i eight = _mm_packus_epi32(_mm256_castsi256_si128(words),
                                           _mm256_extracti128_si256(words, 1));
    /* The set's words come last; what is before them is written over by the next ones. */
    _mm_storeu_si128((void *)(*end - 16),
                     _mm_shuffle_epi8(eight, _mm_loadu_si128((const void *)gives[set])));
    *end -= bytes_of(set);
    x = _mm256_blendv_epi8(x, _mm256_srli_epi32(x, 16), full);
    /* x / frequency < 2^20: roundings and the reciprocal's bias make less than half of one. */
    const __m256 reciprocal = (__m256)entries((const __m256i *)tables->reciprocal, symbol);
    __m256i quotient = _mm256_cvttps_epi32(_mm256_mul_ps(to_float(x), reciprocal));
    __m256i left = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, frequency));
    const __m256i short_of = _mm256_cmpgt_epi32(left, _mm256_sub_epi32(frequency, one));
    quotient = _mm256_sub_epi32(quotient, short_of);
    left = _mm256_sub_epi32(left, _mm256_and_si256(short_of, frequency));
    const __m256i place = _mm256_add_epi32(entries(tables->start, symbol), left);
    const __m256i slot = _mm256_and_si256(
        _mm256_i32gather_epi32((const int *)tables->slot_of, place, 2), _mm256_set1_epi32(0xffff));
    *state = _mm256_add_epi32(_mm256_slli_epi32(quotient, PM_CODEC_SLOT_BITS), slot);
}

PM_TARGET static uint8_t *encode_rows(const pm_codec_encoder *encoder, const uint8_t *symbols,
                                      long rows, uint32_t *state, uint8_t *end)
{
    encode_tables tables = {.slot_of = encoder->slot_of};
    uint32_t frequency[PM_CODEC_SYMBOLS];
    float reciprocal[PM_CODEC_SYMBOLS];
    float_reciprocals(encoder, frequency, reciprocal);
    memcpy(tables.frequency, frequency, sizeof frequency);
    memcpy(tables.start, encoder->starts, sizeof encoder->starts);
    memcpy(tables.reciprocal, reciprocal, sizeof reciprocal);
    __m256i lanes[4];
    for (int i = 0; i < 4; i++)
        lanes[i] = _mm256_set1_epi32(PM_CODEC_LOW);
    const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (long row = rows - 1; row >= 0; row--) {
        /* Even positions, then odd ones, of each half of the row: lanes 0..7, 16..23; 8..15, 24..31. */
        uint8_t parted[2][16];
        for (int half = 0; half < 2; half++) {
            const uint8_t *at = symbols + row * PM_CODEC_LANES + 16 * half;
            _mm_storeu_si128((void *)parted[half],
                             _mm_shuffle_epi8(_mm_loadu_si128((const void *)at), apart));
        }
        push(&tables, &lanes[3], parted[1] + 8, &end);
        push(&tables, &lanes[2], parted[0] + 8, &end);
        push(&tables, &lanes[1], parted[1], &end);
        push(&tables, &lanes[0], parted[0], &end);
    }
    memcpy(state, lanes, sizeof lanes);
    return end;
}
