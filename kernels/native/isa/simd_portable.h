/* 8 float lanes in plain C, for processors without an instruction set of their own here. The names
 * and their meaning are those of simd_avx512.h; the compiler vectorises what it can. */
#include <math.h>

#define PM_INLINE static inline __attribute__((always_inline)) PM_TARGET

enum { VW = 8 };
enum { DOT_T = 2, GEMM_MR = 4, GEMM_NV = 1 };
enum { PAIR_DOT = 0 };

typedef struct {
    float lane[VW];
} vf;

#define LANES(expression)                \
    vf r;                                \
    for (int i = 0; i < VW; i++)         \
        r.lane[i] = (expression);        \
    return r

PM_INLINE vf vf_set1(float x) { LANES(x); }
PM_INLINE vf vf_zero(void) { return vf_set1(0.0f); }
PM_INLINE vf vf_load(const float *p) { LANES(p[i]); }
PM_INLINE vf vf_load_n(const float *p, long n) { LANES(i < n ? p[i] : 0.0f); }
PM_INLINE void vf_store_n(float *p, vf x, long n)
{
    for (long i = 0; i < n; i++)
        p[i] = x.lane[i];
}
PM_INLINE void vf_store(float *p, vf x) { vf_store_n(p, x, VW); }
PM_INLINE vf vf_add(vf a, vf b) { LANES(a.lane[i] + b.lane[i]); }
PM_INLINE vf vf_sub(vf a, vf b) { LANES(a.lane[i] - b.lane[i]); }
PM_INLINE vf vf_mul(vf a, vf b) { LANES(a.lane[i] * b.lane[i]); }
PM_INLINE vf vf_div(vf a, vf b) { LANES(a.lane[i] / b.lane[i]); }
#ifdef FP_FAST_FMAF
PM_INLINE vf vf_fma(vf a, vf b, vf c) { LANES(__builtin_fmaf(a.lane[i], b.lane[i], c.lane[i])); }
#else
PM_INLINE vf vf_fma(vf a, vf b, vf c) { LANES(a.lane[i] * b.lane[i] + c.lane[i]); }
#endif
PM_INLINE vf vf_max(vf a, vf b) { LANES(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
PM_INLINE vf vf_min(vf a, vf b) { LANES(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
PM_INLINE float vf_sum(vf x)
{
    const float *v = x.lane;
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
PM_INLINE float vf_hmax(vf x)
{
    float m = x.lane[0];
    for (int i = 1; i < VW; i++)
        m = x.lane[i] > m ? x.lane[i] : m;
    return m;
}
PM_INLINE void vf_sum4(float out[4], vf a, vf b, vf c, vf d)
{
    out[0] = vf_sum(a);
    out[1] = vf_sum(b);
    out[2] = vf_sum(c);
    out[3] = vf_sum(d);
}

PM_INLINE float widen_bf16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
PM_INLINE uint16_t narrow_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x)
        return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
PM_INLINE vf vf_load_bf16(const uint16_t *p) { LANES(widen_bf16(p[i])); }
PM_INLINE vf vf_load_bf16_n(const uint16_t *p, long n) { LANES(i < n ? widen_bf16(p[i]) : 0.0f); }
PM_INLINE void vf_store_bf16_n(uint16_t *p, vf x, long n)
{
    for (long i = 0; i < n; i++)
        p[i] = narrow_bf16(x.lane[i]);
}
PM_INLINE void vf_store_bf16(uint16_t *p, vf x) { vf_store_bf16_n(p, x, VW); }

PM_INLINE vf vf_split(vf x, vf *exponent)
{
    vf mantissa;
    for (int i = 0; i < VW; i++) {
        int e;
        float m = frexpf(x.lane[i], &e); /* in [0.5, 1) */
        mantissa.lane[i] = m < 0.75f ? 2.0f * m : m;
        exponent->lane[i] = (float)(m < 0.75f ? e - 1 : e);
    }
    return mantissa;
}
PM_INLINE vf vf_round(vf x) { LANES(rintf(x.lane[i])); }
PM_INLINE vf vf_scale2(vf x, vf n) { LANES(ldexpf(x.lane[i], (int)n.lane[i])); }

PM_INLINE void transpose_words(const void *const rows[VW], uint32_t *dst, long stride)
{
    for (int i = 0; i < VW; i++)
        for (int j = 0; j < VW; j++)
            memcpy(&dst[j * stride + i], (const char *)rows[i] + 4 * j, 4);
}
