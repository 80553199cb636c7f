/* Groups of the resident form (resident.h) on AVX-512: 64 weights of a row as two vectors of 32.
 * Every header of this kind offers rt, rt_open and rt_unpack, rt_palette, rt_open_palette, rt_pack
 * and rt_packed. */

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

/* The palette to look codes up in: by the upper half of an exponent, of which trained weights have one to
 * three, the codes by its lower half. */
typedef struct {
    __m512i exponents; /* by code, in every lane */
    int uppers;
    __m512i upper[PM_PALETTE], codes[PM_PALETTE];
} rt_palette;

PM_INLINE rt_palette rt_open_palette(const uint8_t palette[PM_PALETTE])
{
    const pm_halves halves = pm_halves_of(palette);
    rt_palette open;
    open.exponents = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)palette));
    open.uppers = halves.count;
    for (int i = 0; i < halves.count; i++) {
        open.upper[i] = _mm512_set1_epi8((char)halves.upper[i]);
        open.codes[i] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)halves.codes[i]));
    }
    return open;
}

/* 64 weights to their bytes, at a line of the cache; `*codes` become theirs, 0 where there is none. Bit i
 * of the result: the exponent of byte i has no code. */
PM_INLINE uint64_t rt_pack_row(const rt_palette *palette, const uint16_t *row, uint8_t *bytes,
                               __m512i *codes)
{
    const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + 32);
    const __m512i mantissa = _mm512_set1_epi16(0x7f), sign = _mm512_set1_epi16(0x80);
    const __m512i half = _mm512_set1_epi8(15);
    /* 0xea: (x & y) | z; a pack of lanes of 16 bytes is the interleaving of columns */
    const __m512i plain = _mm512_packus_epi16(
        _mm512_ternarylogic_epi32(a, mantissa, _mm512_and_si512(_mm512_srli_epi16(a, 8), sign), 0xea),
        _mm512_ternarylogic_epi32(b, mantissa, _mm512_and_si512(_mm512_srli_epi16(b, 8), sign), 0xea));
    const __m512i exponent = _mm512_packus_epi16(
        _mm512_and_si512(_mm512_srli_epi16(a, 7), _mm512_set1_epi16(0xff)),
        _mm512_and_si512(_mm512_srli_epi16(b, 7), _mm512_set1_epi16(0xff)));
    const __m512i lower = _mm512_and_si512(exponent, half);
    const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(exponent, 4), half);
    __m512i code = _mm512_setzero_si512();
    for (int i = 0; i < palette->uppers; i++)
        code = _mm512_mask_shuffle_epi8(code, _mm512_cmpeq_epi8_mask(upper, palette->upper[i]),
                                        palette->codes[i], lower);
    const __mmask64 found =
        _mm512_cmpeq_epi8_mask(_mm512_shuffle_epi8(palette->exponents, code), exponent);
    *codes = _mm512_maskz_mov_epi8(found, code);
    _mm512_stream_si512((__m512i *)bytes, plain);
    return ~found;
}

/* Two rows, of which the first one's codes are the lower halves, past the caches. */
PM_INLINE void rt_pack(const rt_palette *palette, const uint16_t *const rows[2], uint8_t *bytes,
                       uint8_t *codes, uint64_t missing[2])
{
    __m512i lower, upper;
    missing[0] = rt_pack_row(palette, rows[0], bytes, &lower);
    missing[1] = rt_pack_row(palette, rows[1], bytes + PM_GROUP_COLUMNS, &upper);
    _mm512_stream_si512((__m512i *)codes, _mm512_or_si512(lower, _mm512_slli_epi16(upper, 4)));
}

/* What was written past the caches comes before what other threads are told. */
PM_INLINE void rt_packed(void) { _mm_sfence(); }
