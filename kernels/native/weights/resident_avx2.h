/* Groups of the resident form (resident.h) on AVX2; see resident_avx512.h. */

typedef struct {
    __m256i low, high;
} rt;

PM_INLINE rt rt_open(const uint8_t palette[16])
{
    const __m128i e = _mm_loadu_si128((const __m128i *)palette);
    const __m128i low = _mm_and_si128(_mm_slli_epi16(e, 7), _mm_set1_epi8((char)0x80));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(e, 1), _mm_set1_epi8(0x7f));
    return (rt){_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}

PM_INLINE void rt_unpack(rt tables, const uint8_t *group, int r, uint16_t *out)
{
    const uint8_t *codes_at = group + PM_GROUP_CODES + r / 2 * PM_GROUP_COLUMNS;
    for (int half = 0; half < 2; half++) {
        const __m256i bytes = _mm256_load_si256(
            (const __m256i *)(group + r * PM_GROUP_COLUMNS + 32 * half));
        __m256i codes = _mm256_load_si256((const __m256i *)(codes_at + 32 * half));
        if (r % 2 == 1)
            codes = _mm256_srli_epi16(codes, 4);
        codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
        const __m256i low = _mm256_or_si256(_mm256_and_si256(bytes, _mm256_set1_epi8(0x7f)),
                                            _mm256_shuffle_epi8(tables.low, codes));
        const __m256i high = _mm256_or_si256(
            _mm256_and_si256(bytes, _mm256_set1_epi8((char)0x80)),
            _mm256_shuffle_epi8(tables.high, codes));
        _mm256_storeu_si256((__m256i *)(out + 16 * half), _mm256_unpacklo_epi8(low, high));
        _mm256_storeu_si256((__m256i *)(out + 32 + 16 * half), _mm256_unpackhi_epi8(low, high));
    }
}
