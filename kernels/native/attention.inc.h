/* Attention over the paged cache for one element type. One item is one KV head of one sequence, for
 * its single query (decode: two passes over the keys, scores kept) or for a block of its queries
 * (prefill chunk: online softmax over key tiles of GEMM_NP, both products through the gemm tile).
 * Scores and sums are float32; probabilities are rounded to A for the second product of a chunk.
 *
 * Roofline: decode reads 4 Hk D bytes (bf16) per cached token and multiplies 2 Hq D times, so it is
 * bound by memory. 16 sequences of 512 tokens (Hq 9, Hk 3, D 64) take 0.54 ms on one Zen 5 core,
 * 11.7 GB/s of a measured 21. A chunk is bound by arithmetic: 2,048 tokens take 22 ms on that core,
 * 109 billion multiply-adds/s, exponentials included.
 */

#ifndef PM_ATTENTION_ONCE
#define PM_ATTENTION_ONCE
/* How far decode loads ahead. A block of 16 tokens takes about the latency of one memory access; 1
 * and 2 measured alike, 4 worse, none several times worse (Zen 5, 16 sequences of 512 tokens). */
enum { PREFETCH_BLOCKS = 2 };
#endif

typedef struct {
    const E *base; /* cache at this KV head */
    const int32_t *table;
    long block_tokens, block_stride, token_stride;
} FN(paged);

PM_INLINE FN(paged) FN(open_cache)(const pm_attention_job *job, const void *cache, long sequence,
                                   long kv_head)
{
    const long token = job->Hk * job->D;
    FN(paged) view = {(const E *)cache + kv_head * job->D,
                      job->block_tables + sequence * job->table_stride, job->block_tokens,
                      job->block_tokens * token, token};
    return view;
}

PM_INLINE const E *FN(block_row)(const FN(paged) * view, long block)
{
    return view->base + view->table[block] * view->block_stride;
}

PM_INLINE const E *FN(token_row)(const FN(paged) * view, long position)
{
    return FN(block_row)(view, position / view->block_tokens) +
           position % view->block_tokens * view->token_stride;
}

/* Starts loading this KV head's rows of the first `tokens` positions of a block. Blocks lie
 * anywhere, so the processor cannot foresee the next one. */
PM_INLINE void FN(prefetch_block)(const FN(paged) * view, long block, long tokens, long D)
{
    const char *row = (const char *)FN(block_row)(view, block);
    for (long i = 0; i < tokens; i++, row += view->token_stride * (long)sizeof(E))
        for (long at = 0; at < D * (long)sizeof(E); at += 64)
            __builtin_prefetch(row + at);
}

PM_INLINE void FN(prefetch_ahead)(const FN(paged) * view, long block, long position, long context,
                                  long D)
{
    const long left = context - (position + PREFETCH_BLOCKS * view->block_tokens);
    if (left > 0)
        FN(prefetch_block)(view, block + PREFETCH_BLOCKS, pm_min(view->block_tokens, left), D);
}

/* scores[g][p] = scale * q[g] . k[p] for all p < context. */
PM_INLINE void FN(score_keys)(const E *q, long heads, long D, const FN(paged) * keys, long context,
                              float scale, float *scores, long stride)
{
    for (long p = 0, block = 0; p < context; block++) {
        const E *base = FN(block_row)(keys, block);
        const long in_block = pm_min(keys->block_tokens, context - p);
        FN(prefetch_ahead)(keys, block, p, context, D);
        for (long first = 0; first < in_block; first += 4) {
            const E *k[4];
            const long n = pm_min(4, in_block - first);
            for (long i = 0; i < 4; i++)
                k[i] = base + pm_min(first + i, in_block - 1) * keys->token_stride;
            for (long g = 0; g < heads; g++) {
                vf acc[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
                float sums[4];
                long d = 0;
                for (; d + DW <= D; d += DW) {
                    dv qv = d_load(q + g * D + d);
                    for (int i = 0; i < 4; i++)
                        acc[i] = d_dot(acc[i], qv, d_load(k[i] + d));
                }
                if (d < D) {
                    dv qv = d_load_n(q + g * D + d, D - d);
                    for (int i = 0; i < 4; i++)
                        acc[i] = d_dot(acc[i], qv, d_load_n(k[i] + d, D - d));
                }
                vf_sum4(sums, acc[0], acc[1], acc[2], acc[3]);
                for (long i = 0; i < n; i++)
                    scores[g * stride + p + first + i] = sums[i] * scale;
            }
        }
        p += in_block;
    }
}

/* Replaces scores by exp(score - max); returns 1 / their sum. */
PM_INLINE float FN(softmax)(float *scores, long n)
{
    vf top = vf_set1(-INFINITY), total = vf_zero();
    long i;
    for (i = 0; i + VW <= n; i += VW)
        top = vf_max(top, vf_load(scores + i));
    float peak = vf_hmax(top);
    for (; i < n; i++)
        peak = scores[i] > peak ? scores[i] : peak;
    for (i = 0; i + VW <= n; i += VW) {
        vf e = vf_exp(vf_sub(vf_load(scores + i), vf_set1(peak)));
        vf_store(scores + i, e);
        total = vf_add(total, e);
    }
    float sum = vf_sum(total);
    if (i < n) {
        vf_store_n(scores + i, vf_exp(vf_sub(vf_load_n(scores + i, n - i), vf_set1(peak))), n - i);
        for (; i < n; i++)
            sum += scores[i];
    }
    return 1.0f / sum;
}

/* out[g] = factors[g] * sum over p of scores[g][p] v[p]; heads is constant where this is called. */
PM_INLINE void FN(weigh_values)(E *out, const float *factors, const float *scores, long stride,
                                const FN(paged) * values, long context, long D, const int heads)
{
    enum { WIDTH = 4 };
    for (long d = 0; d < D; d += WIDTH * VW) {
        const long columns = pm_min(WIDTH * VW, D - d);
        vf acc[PV_HEADS][WIDTH];
        for (int g = 0; g < heads; g++)
            for (int j = 0; j < WIDTH; j++)
                acc[g][j] = vf_zero();
        for (long p = 0, block = 0; p < context; block++) {
            const E *v = FN(block_row)(values, block) + d;
            const long end = pm_min(context, p + values->block_tokens);
            FN(prefetch_ahead)(values, block, p, context, D);
            for (; p < end; p++, v += values->token_stride) {
                vf row[WIDTH];
                if (columns == WIDTH * VW)
                    for (int j = 0; j < WIDTH; j++)
                        row[j] = e_load(v + j * VW);
                else
                    for (int j = 0; j < WIDTH; j++) {
                        const long n = pm_min(VW, columns - j * VW);
                        row[j] = n > 0 ? e_load_n(v + j * VW, n) : vf_zero();
                    }
                for (int g = 0; g < heads; g++) {
                    vf weight = vf_set1(scores[g * stride + p]);
                    for (int j = 0; j < WIDTH; j++)
                        acc[g][j] = vf_fma(weight, row[j], acc[g][j]);
                }
            }
        }
        for (int g = 0; g < heads; g++)
            for (int j = 0; j < WIDTH && j * VW < columns; j++)
                e_store_n(out + g * D + d + j * VW, vf_mul(acc[g][j], vf_set1(factors[g])),
                          pm_min(VW, columns - j * VW));
    }
}

PM_INLINE void FN(attend_one)(const pm_attention_job *job, pm_attention_item item, float *scores)
{
    const long D = job->D, group = job->Hq / job->Hk, context = job->context_lens[item.sequence];
    const long row = job->query_starts[item.sequence] + item.query_lo;
    const E *q = (const E *)job->q + row * job->q_stride + item.kv_head * group * D;
    E *out = (E *)job->out + (row * job->Hq + item.kv_head * group) * D;
    const FN(paged) keys = FN(open_cache)(job, job->k_cache, item.sequence, item.kv_head);
    const FN(paged) values = FN(open_cache)(job, job->v_cache, item.sequence, item.kv_head);
    for (long g = 0; g < group; g += PV_HEADS) {
        const long heads = pm_min(PV_HEADS, group - g);
        float factors[PV_HEADS];
        FN(score_keys)(q + g * D, heads, D, &keys, context, job->scale, scores, context);
        for (long h = 0; h < heads; h++)
            factors[h] = FN(softmax)(scores + h * context, context);
        E *to = out + g * D;
        switch (heads) {
        case 1: FN(weigh_values)(to, factors, scores, context, &values, context, D, 1); break;
        case 2: FN(weigh_values)(to, factors, scores, context, &values, context, D, 2); break;
#if PM_PV_HEADS > 2
        case 3: FN(weigh_values)(to, factors, scores, context, &values, context, D, 3); break;
        case 4: FN(weigh_values)(to, factors, scores, context, &values, context, D, 4); break;
#endif
        }
    }
}

/* Scratch of a chunk: M = q_block * group rows. */
typedef struct {
    A *q;            /* [M][Dk], Dk = D rounded up to STEP */
    A *p;            /* [M][GEMM_NP] */
    float *s;        /* [M][GEMM_NP] */
    float *o;        /* [M][Dv], Dv = D rounded up to GEMM_NP */
    float *peak;     /* [M] */
    float *sum;      /* [M] */
    uint32_t *b;     /* packed K^T [Dk / STEP][GEMM_NP], then V [GEMM_NP / STEP][GEMM_NP] */
    size_t bytes;
} FN(chunk);

static FN(chunk) FN(lay_out)(const pm_attention_job *job, char *memory)
{
    const size_t rows = (size_t)(job->q_block * (job->Hq / job->Hk));
    const size_t dk = (size_t)(pm_ceil_div(job->D, STEP) * STEP);
    const size_t dv_ = (size_t)(pm_ceil_div(job->D, GEMM_NP) * GEMM_NP);
    const size_t words = (size_t)pm_max((long)dk, GEMM_NP) * GEMM_NP;
    FN(chunk) c;
    size_t at = 0;
#define PLACE(field, count)                                  \
    c.field = (void *)(memory + at);                         \
    at += pm_round64((size_t)(count) * sizeof *c.field)
    PLACE(q, rows * dk);
    PLACE(p, rows * GEMM_NP);
    PLACE(s, rows * GEMM_NP);
    PLACE(o, rows * dv_);
    PLACE(peak, rows);
    PLACE(sum, rows);
    PLACE(b, words);
#undef PLACE
    c.bytes = at;
    return c;
}

static size_t FN(attention_scratch)(const pm_attention_job *job)
{
    static char nothing[1];
    size_t one = (size_t)PV_HEADS * (size_t)job->max_context * sizeof(float);
    size_t chunk = FN(lay_out)(job, nothing).bytes;
    return one > chunk ? one : chunk;
}

PM_INLINE void FN(gemm_rows)(const A *a, long lda, const uint32_t *b, long steps, float *c,
                             long ldc, int accumulate, long rows)
{
    for (long i = 0; i < rows; i += GEMM_MR)
        FN(gemm_tile)(a + i * lda, lda, b, steps, c + i * ldc, ldc, accumulate,
                      pm_min(GEMM_MR, rows - i));
}

/* Online softmax of one row of a key tile: probabilities to p, running peak, sum and o updated. */
PM_INLINE void FN(softmax_tile)(FN(chunk) * c, long row, long visible, float scale, long dv_)
{
    float *s = c->s + row * GEMM_NP, *o = c->o + row * dv_;
    vf top = vf_set1(c->peak[row]), total = vf_zero();
    for (long j = 0; j < GEMM_NP; j += VW) {
        const long n = pm_min(VW, visible - j);
        vf v = n > 0 ? vf_mul(vf_load(s + j), vf_set1(scale)) : vf_set1(-INFINITY);
        if (n < VW) { /* hide what the query may not see */
            vf_store(s + j, v);
            for (long i = pm_max(n, 0); i < VW; i++)
                s[j + i] = -INFINITY;
            v = vf_load(s + j);
        }
        vf_store(s + j, v);
        top = vf_max(top, v);
    }
    const float peak = vf_hmax(top), decay = expf(c->peak[row] - peak);
    for (long j = 0; j < GEMM_NP; j += VW) {
        vf e = vf_exp(vf_sub(vf_load(s + j), vf_set1(peak)));
        total = vf_add(total, e);
#if PAIRS
        vf_store_bf16(c->p + row * GEMM_NP + j, e);
#else
        vf_store(c->p + row * GEMM_NP + j, e);
#endif
    }
    c->sum[row] = c->sum[row] * decay + vf_sum(total);
    c->peak[row] = peak;
    if (decay != 1.0f)
        for (long j = 0; j < dv_; j += VW)
            vf_store(o + j, vf_mul(vf_load(o + j), vf_set1(decay)));
}

/* Packs columns [d, d + GEMM_NP) of n keys of V from `first` on as B, zero beyond them. */
PM_INLINE void FN(pack_values)(const FN(paged) * values, long first, long n, long d, long D,
                               uint32_t *b)
{
    for (long s = 0; s < GEMM_NP / STEP; s++, b += GEMM_NP) {
        const long p = s * STEP;
        if (p >= n) {
            memset(b, 0, GEMM_NP * sizeof *b);
            continue;
        }
        const E *v0 = FN(token_row)(values, first + p) + d;
#if PAIRS
        /* A lone last key is paired with itself; its partner's probability is 0. */
        const E *v1 = FN(token_row)(values, first + pm_min(p + 1, n - 1)) + d;
#endif
        for (long j = 0; j < GEMM_NP; j += VW) {
            const long lanes = pm_min(VW, D - d - j);
            if (lanes <= 0) {
                memset(b + j, 0, VW * sizeof *b);
                continue;
            }
#if PAIRS
            vb_interleave_n(b + j, v0 + j, v1 + j, lanes);
#else
            vf_store((float *)b + j, e_load_n(v0 + j, lanes));
#endif
        }
    }
}

PM_INLINE void FN(attend_chunk)(const pm_attention_job *job, pm_attention_item item, char *memory)
{
    const long D = job->D, group = job->Hq / job->Hk, context = job->context_lens[item.sequence];
    const long dk = pm_ceil_div(D, STEP) * STEP, dv_ = pm_ceil_div(D, GEMM_NP) * GEMM_NP;
    const long start = job->query_starts[item.sequence];
    const long queries = job->query_starts[item.sequence + 1] - start;
    const long rows = (item.query_hi - item.query_lo) * group;
    const long before = context - queries; /* position of the sequence's first query */
    const long seen = before + item.query_hi; /* keys that the last query of the block sees */
    const FN(paged) keys = FN(open_cache)(job, job->k_cache, item.sequence, item.kv_head);
    const FN(paged) values = FN(open_cache)(job, job->v_cache, item.sequence, item.kv_head);
    FN(chunk) c = FN(lay_out)(job, memory);

    for (long r = 0; r < rows; r++) { /* rows of a query are its heads */
        const E *q = (const E *)job->q + (start + item.query_lo + r / group) * job->q_stride +
                     (item.kv_head * group + r % group) * D;
        FN(copy_row)(c.q + r * dk, q, D, dk);
        c.peak[r] = -INFINITY;
        c.sum[r] = 0.0f;
    }
    memset(c.o, 0, (size_t)(rows * dv_) * sizeof *c.o);

    for (long first = 0; first < seen; first += GEMM_NP) {
        const long n = pm_min(GEMM_NP, seen - first);
        const E *columns[GEMM_NP];
        for (long i = 0; i < GEMM_NP; i++)
            columns[i] = FN(token_row)(&keys, first + pm_min(i, n - 1));
        FN(pack_rows)(columns, D, c.b);
        FN(gemm_rows)(c.q, dk, c.b, dk / STEP, c.s, GEMM_NP, 0, rows);
        for (long r = 0; r < rows; r++) {
            const long visible = before + item.query_lo + r / group + 1 - first;
            if (visible > 0) {
                FN(softmax_tile)(&c, r, pm_min(visible, GEMM_NP), job->scale, dv_);
            } else {
                memset(c.p + r * GEMM_NP, 0, GEMM_NP * sizeof *c.p);
            }
        }
        for (long d = 0; d < D; d += GEMM_NP) {
            FN(pack_values)(&values, first, n, d, D, c.b);
            FN(gemm_rows)(c.p, GEMM_NP, c.b, GEMM_NP / STEP, c.o + d, dv_, 1, rows);
        }
    }

    for (long r = 0; r < rows; r++) {
        const long token = start + item.query_lo + r / group;
        E *out = (E *)job->out + (token * job->Hq + item.kv_head * group + r % group) * D;
        const vf factor = vf_set1(1.0f / c.sum[r]);
        for (long d = 0; d < D; d += VW) {
            const long lanes = pm_min(VW, D - d);
            e_store_n(out + d, vf_mul(vf_load(c.o + r * dv_ + d), factor), lanes);
        }
    }
}

PM_TARGET static void FN(attention)(const void *argument, long item, void *scratch)
{
    const pm_attention_job *job = argument;
    pm_attention_item which = pm_attention_locate(job, item);
    long start = job->query_starts[which.sequence];
    if (job->query_starts[which.sequence + 1] - start == 1)
        FN(attend_one)(job, which, scratch);
    else
        FN(attend_chunk)(job, which, scratch);
}
