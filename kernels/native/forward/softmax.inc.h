/* Online softmax over key tiles for one element type, a part of an item's rows at a time: included by
 * attention.inc.h, whose FN(chunk) says what lies where. Scores are in octaves, e^x = 2^(x log2 e). */

/* Scales a row of scores; -inf replaces what the query may not see. Returns the greatest. */
PM_INLINE float FN(scale_row)(float *s, long visible, float scale)
{
    vf top = vf_set1(-INFINITY);
    for (long j = 0; j < GEMM_NP; j += VW) {
        const vf v = vf_mul(vf_load(s + j), vf_set1(scale));
        vf_store(s + j, v);
        top = vf_max(top, v);
    }
    if (visible < GEMM_NP) {
        for (long j = visible; j < GEMM_NP; j++)
            s[j] = -INFINITY;
        top = vf_set1(-INFINITY);
        for (long j = 0; j < visible; j += VW)
            top = vf_max(top, vf_load(s + j));
    }
    return vf_hmax(top);
}

/* Probabilities of a row from its scores, not divided by their sum, which it returns. */
PM_INLINE float FN(exponentials)(const float *s, float peak, A *p)
{
    vf total = vf_zero();
#if PAIRS
    for (long j = 0; j < GEMM_NP; j += BW) {
        const vf low = vf_exp2(vf_sub(vf_load(s + j), vf_set1(peak)));
        const vf high = vf_exp2(vf_sub(vf_load(s + j + VW), vf_set1(peak)));
        total = vf_add(vf_add(total, low), high);
        vb_store(p + j, low, high);
    }
#else
    for (long j = 0; j < GEMM_NP; j += VW) {
        const vf e = vf_exp2(vf_sub(vf_load(s + j), vf_set1(peak)));
        total = vf_add(total, e);
        vf_store(p + j, e);
    }
#endif
    return vf_sum(total);
}

/* Online softmax of a part's scores, rows [first, first + n) of the chunk: probabilities to p, running
 * peaks, sums and o updated. Row r sees `seen + r / group` keys of the tile. `scale`: in octaves. */
PM_INLINE void FN(softmax_part)(FN(chunk) * c, long first, long n, long seen, long group,
                                float scale, long dv_)
{
    for (long i = 0; i < n; i++) {
        const long visible = pm_min(seen + (first + i) / group, GEMM_NP);
        const float top = FN(scale_row)(c->s + i * GEMM_NP, visible, scale);
        c->top[i] = top > c->peak[first + i] ? top : c->peak[first + i];
    }
    for (long i = 0; i < n; i += VW) {
        float *const peak = c->peak + first + i, *const sum = c->sum + first + i;
        const vf top = vf_load(c->top + i), decay = vf_exp2(vf_sub(vf_load(peak), top));
        vf_store(c->decay + i, decay); /* 0 for the first tile */
        vf_store(peak, top);
        vf_store(sum, vf_mul(vf_load(sum), decay));
    }
    for (long i = 0; i < n; i++) {
        c->sum[first + i] +=
            FN(exponentials)(c->s + i * GEMM_NP, c->top[i], c->p + i * GEMM_NP);
        if (c->decay[i] != 1.0f) {
            float *const o = c->o + (first + i) * dv_;
            for (long j = 0; j < dv_; j += VW)
                vf_store(o + j, vf_mul(vf_load(o + j), vf_set1(c->decay[i])));
        }
    }
}
