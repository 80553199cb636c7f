/* 16 float lanes on AVX-512 (F, BW, VL, DQ). Included by one translation unit per instruction set,
 * which defines PM_TARGET; every header of this kind offers the same names. */
#include <immintrin.h>

#define PM_INLINE static inline __attribute__((always_inline)) PM_TARGET

enum { VW = 16 };
/* Register tiles. dot: rows of x; gemm: rows and vectors of columns. */
enum { DOT_T = 6, GEMM_MR = 6, GEMM_NV = 4 };

typedef __m512 vf;

PM_INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
PM_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
PM_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
PM_INLINE void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
PM_INLINE __mmask16 first_lanes(long n) { return (__mmask16)((1u << n) - 1); }
PM_INLINE vf vf_load_n(const float *p, long n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
PM_INLINE void vf_store_n(float *p, vf x, long n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
PM_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
PM_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
PM_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
PM_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
PM_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
/* Where a lane is NaN, max and min yield b. */
PM_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
PM_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
PM_INLINE float vf_sum(vf x) { return _mm512_reduce_add_ps(x); }
PM_INLINE float vf_hmax(vf x) { return _mm512_reduce_max_ps(x); }

/* out[i] = sum of the lanes of the i-th argument. */
PM_INLINE void vf_sum4(float out[4], vf a, vf b, vf c, vf d)
{
    vf ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    vf cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    vf s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

PM_INLINE vf widen_bf16(__m256i x)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

/* Round to nearest, ties to even; NaN stays NaN. */
PM_INLINE __m256i narrow_bf16(vf x)
{
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

PM_INLINE vf vf_load_bf16(const uint16_t *p)
{
    return widen_bf16(_mm256_loadu_si256((const __m256i *)p));
}
PM_INLINE vf vf_load_bf16_n(const uint16_t *p, long n)
{
    return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
PM_INLINE void vf_store_bf16(uint16_t *p, vf x)
{
    _mm256_storeu_si256((__m256i *)p, narrow_bf16(x));
}
PM_INLINE void vf_store_bf16_n(uint16_t *p, vf x, long n)
{
    _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(x));
}

/* x = mantissa * 2^exponent with mantissa in [0.75, 1.5), for finite x > 0. */
PM_INLINE vf vf_split(vf x, vf *exponent)
{
    vf mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    __mmask16 halved = _mm512_cmp_ps_mask(mantissa, _mm512_set1_ps(1.0f), _CMP_LT_OQ);
    *exponent = _mm512_getexp_ps(x);
    *exponent = _mm512_mask_add_ps(*exponent, halved, *exponent, _mm512_set1_ps(1.0f));
    return mantissa;
}
PM_INLINE vf vf_round(vf x)
{
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* x * 2^n, n integral; under- and overflow are graceful. */
PM_INLINE vf vf_scale2(vf x, vf n) { return _mm512_scalef_ps(x, n); }

/* dst[j * stride + i] = rows[i][j] for VW x VW words of 32 bits; rows need no alignment. */
PM_INLINE void transpose_words(const void *const rows[VW], uint32_t *dst, long stride)
{
    __m512i a[VW], b[VW];
    for (int i = 0; i < VW; i++)
        a[i] = _mm512_loadu_si512(rows[i]);
    for (int i = 0; i < VW; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < VW; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        uint32_t *to = dst + i * stride;
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + 4 * stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + 8 * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + 12 * stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

#if PM_HAVE_DPBF16
/* Dot products of bf16 pairs, accumulated in float32. */
enum { PAIR_DOT = 1, BW = 32 };
typedef __m512i vb;
PM_INLINE vb vb_load(const uint16_t *p) { return _mm512_loadu_si512(p); }
PM_INLINE vb vb_load_n(const uint16_t *p, long n)
{
    return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
PM_INLINE vf vb_dot(vf acc, vb a, vb b)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
/* Stores BW floats, rounded as by vf_store_bf16 but for subnormal results, which are 0. */
PM_INLINE void vb_store(uint16_t *p, vf low, vf high)
{
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
/* The pair (p[0], p[1]) in every lane. */
PM_INLINE vb vb_pair(const uint16_t *p)
{
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}
PM_INLINE vb vb_load_words(const uint32_t *p) { return _mm512_loadu_si512(p); }
/* dst[i] = (a[i], b[i]) as one word, n <= VW. */
PM_INLINE void vb_interleave_n(uint32_t *dst, const uint16_t *a, const uint16_t *b, long n)
{
    __m512i lo = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), a));
    __m512i hi = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), b));
    _mm512_storeu_si512(dst, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
}
#else
enum { PAIR_DOT = 0 };
#endif
