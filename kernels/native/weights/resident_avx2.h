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

/* See resident_avx512.h. */
typedef struct {
    __m256i exponents;
    int uppers;
    __m256i upper[PM_PALETTE], codes[PM_PALETTE];
} rt_palette;

PM_INLINE rt_palette rt_open_palette(const uint8_t palette[PM_PALETTE])
{
    const pm_halves halves = pm_halves_of(palette);
    rt_palette open;
    open.exponents = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)palette));
    open.uppers = halves.count;
    for (int i = 0; i < halves.count; i++) {
        open.upper[i] = _mm256_set1_epi8((char)halves.upper[i]);
        open.codes[i] =
            _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)halves.codes[i]));
    }
    return open;
}

PM_INLINE __m256i rt_plain(__m256i x)
{
    return _mm256_or_si256(_mm256_and_si256(x, _mm256_set1_epi16(0x7f)),
                           _mm256_and_si256(_mm256_srli_epi16(x, 8), _mm256_set1_epi16(0x80)));
}

PM_INLINE __m256i rt_exponent(__m256i x)
{
    return _mm256_and_si256(_mm256_srli_epi16(x, 7), _mm256_set1_epi16(0xff));
}

/* Half a row. */
PM_INLINE uint32_t rt_pack_half(const rt_palette *palette, const uint16_t *row, uint8_t *bytes,
                                __m256i *codes)
{
    const __m256i a = _mm256_loadu_si256((const __m256i *)row);
    const __m256i b = _mm256_loadu_si256((const __m256i *)(row + 32));
    const __m256i exponent = _mm256_packus_epi16(rt_exponent(a), rt_exponent(b));
    const __m256i half = _mm256_set1_epi8(15), lower = _mm256_and_si256(exponent, half);
    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(exponent, 4), half);
    __m256i code = _mm256_setzero_si256();
    for (int i = 0; i < palette->uppers; i++) {
        const __m256i of_upper = _mm256_shuffle_epi8(palette->codes[i], lower);
        code = _mm256_or_si256(
            code, _mm256_and_si256(of_upper, _mm256_cmpeq_epi8(upper, palette->upper[i])));
    }
    const __m256i found =
        _mm256_cmpeq_epi8(_mm256_shuffle_epi8(palette->exponents, code), exponent);
    *codes = _mm256_and_si256(code, found);
    _mm256_stream_si256((__m256i *)bytes, _mm256_packus_epi16(rt_plain(a), rt_plain(b)));
    return ~(uint32_t)_mm256_movemask_epi8(found);
}

PM_INLINE void rt_pack(const rt_palette *palette, const uint16_t *const rows[2], uint8_t *bytes,
                       uint8_t *codes, uint64_t missing[2])
{
    __m256i found[2][2]; /* by row and half */
    for (int r = 0; r < 2; r++) {
        uint8_t *const at = bytes + r * PM_GROUP_COLUMNS;
        const uint32_t first = rt_pack_half(palette, rows[r], at, &found[r][0]);
        const uint32_t second = rt_pack_half(palette, rows[r] + 16, at + 32, &found[r][1]);
        missing[r] = first | (uint64_t)second << 32;
    }
    for (int half = 0; half < 2; half++)
        _mm256_stream_si256(
            (__m256i *)(codes + 32 * half),
            _mm256_or_si256(found[0][half], _mm256_slli_epi16(found[1][half], 4)));
}

PM_INLINE void rt_packed(void) { _mm_sfence(); }
