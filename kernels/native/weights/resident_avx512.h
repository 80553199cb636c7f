/* Groups of the resident form (resident.h) on AVX-512: 64 weights of a row as two vectors of 32.
 * Every header of this kind offers rt, rt_open and rt_unpack. */

/* The palette as bytes to be joined with sign and mantissa: by code, in every lane. */
typedef struct {
    __m512i low, high;
} rt;

PM_INLINE rt rt_open(const uint8_t palette[16])
{
    const __m128i e = _mm_loadu_si128((const __m128i *)palette);
    const __m128i low = _mm_and_si128(_mm_slli_epi16(e, 7), _mm_set1_epi8((char)0x80));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(e, 1), _mm_set1_epi8(0x7f));
    return (rt){_mm512_broadcast_i32x4(low), _mm512_broadcast_i32x4(high)};
}

/* Row r of a group: columns 0 to 31 and 32 to 63. */
PM_INLINE void rt_row(rt tables, const uint8_t *group, int r, __m512i out[2])
{
    const __m512i bytes = _mm512_load_si512(group + r * PM_GROUP_COLUMNS);
    __m512i codes = _mm512_load_si512(group + PM_GROUP_CODES + r / 2 * PM_GROUP_COLUMNS);
    if (r % 2 == 1)
        codes = _mm512_srli_epi16(codes, 4);
    codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
    /* 0xea: (a & b) | c */
    const __m512i low = _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(0x7f),
                                                  _mm512_shuffle_epi8(tables.low, codes), 0xea);
    const __m512i high = _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8((char)0x80),
                                                   _mm512_shuffle_epi8(tables.high, codes), 0xea);
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
}

PM_INLINE void rt_unpack(rt tables, const uint8_t *group, int r, uint16_t *out)
{
    __m512i row[2];
    rt_row(tables, group, r, row);
    _mm512_storeu_si512(out, row[0]);
    _mm512_storeu_si512(out + 32, row[1]);
}
