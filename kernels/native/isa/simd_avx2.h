/* 8 float lanes on AVX2 with FMA. The names and their meaning are those of simd_avx512.h. */
#include <immintrin.h>

#define PM_INLINE static inline __attribute__((always_inline)) PM_TARGET

enum { VW = 8 };
enum { DOT_T = 2, GEMM_MR = 6, GEMM_NV = 2 };
enum { PAIR_DOT = 0 };

typedef __m256 vf;

PM_INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
PM_INLINE vf vf_set1(float x) { return _mm256_set1_ps(x); }
PM_INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
PM_INLINE void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
PM_INLINE vf vf_load_n(const float *p, long n)
{
    float lanes[VW] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return vf_load(lanes);
}
PM_INLINE void vf_store_n(float *p, vf x, long n)
{
    float lanes[VW];
    vf_store(lanes, x);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}
PM_INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
PM_INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
PM_INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
PM_INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
PM_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
PM_INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
PM_INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
PM_INLINE float vf_sum(vf x)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
PM_INLINE float vf_hmax(vf x)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
PM_INLINE void vf_sum4(float out[4], vf a, vf b, vf c, vf d)
{
    vf s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

PM_INLINE vf vf_load_bf16(const uint16_t *p)
{
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
PM_INLINE vf vf_load_bf16_n(const uint16_t *p, long n)
{
    uint16_t lanes[VW] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return vf_load_bf16(lanes);
}
PM_INLINE void vf_store_bf16(uint16_t *p, vf x)
{
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    up = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(up),
                                                    _mm256_extracti128_si256(up, 1)));
}
PM_INLINE void vf_store_bf16_n(uint16_t *p, vf x, long n)
{
    uint16_t lanes[VW];
    vf_store_bf16(lanes, x);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}

PM_INLINE vf vf_split(vf x, vf *exponent)
{
    /* Shift the exponent field so that mantissas from 1.5 on count as 0.75 of the next power. */
    const __m256i half_step = _mm256_set1_epi32(0x400000);
    __m256i bits = _mm256_castps_si256(x);
    __m256i e = _mm256_sub_epi32(_mm256_srli_epi32(_mm256_add_epi32(bits, half_step), 23),
                                 _mm256_set1_epi32(127));
    *exponent = _mm256_cvtepi32_ps(e);
    return _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
}
PM_INLINE vf vf_round(vf x)
{
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
PM_INLINE vf power_of_2(__m256i n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
PM_INLINE vf vf_scale2(vf x, vf n)
{
    /* In two halves, so that 2^-149 .. 2^128 are all reached through normal factors. */
    __m256i whole = _mm256_cvtps_epi32(n);
    __m256i half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power_of_2(half)),
                         power_of_2(_mm256_sub_epi32(whole, half)));
}

PM_INLINE void transpose_words(const void *const rows[VW], uint32_t *dst, long stride)
{
    __m256 a[VW], b[VW];
    for (int i = 0; i < VW; i++)
        a[i] = _mm256_loadu_ps((const float *)rows[i]);
    for (int i = 0; i < VW; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < VW; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        float *low = (float *)dst + i * stride, *high = (float *)dst + (i + 4) * stride;
        _mm256_storeu_ps(low, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(high, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}
