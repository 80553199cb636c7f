/* Causal attention over the paged cache for one element type. One item is one KV head of one sequence
 * for a block of its queries: online softmax over key tiles of GEMM_NP, both products through the
 * gemm tile. Scores and sums are float32; probabilities are rounded to A for the second product.
 *
 * Tiles are counted from position 0, whatever the first query, and a decode step is a block of one
 * query. So the bits of a query's result are a function of its position, its own vector and the keys
 * and values up to it: not of the chunk it came in, the blocks they lie in, or the threads.
 *
 * Roofline: decode reads 4 Hk D bytes (bf16) per cached token and multiplies 2 Hq D times. 16
 * sequences of 512 tokens take 0.20 ms on one Zen 5 core for Hq 9, Hk 3, D 64 (31 GB/s, caches
 * helping), 2.1 ms for 32, 8, 128 (16 GB/s of a measured 21). A chunk is bound by arithmetic: 512
 * tokens take 1.4 ms on that core (Hq 9), exponentials included.
 */

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
    return FN(lay_out)(job, nothing).bytes;
}

PM_INLINE void FN(gemm_rows)(const A *a, long lda, const uint32_t *b, long steps, float *c,
                             long ldc, int accumulate, long rows)
{
    for (long i = 0; i < rows; i += GEMM_MR)
        FN(gemm_tile)(a + i * lda, lda, b, steps, c + i * ldc, ldc, accumulate,
                      pm_min(GEMM_MR, rows - i));
}

/* Online softmax of one row of a key tile: probabilities to p, running peak, sum and o updated. What
 * the query may not see gets probability 0, which leaves every sum as it is. */
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
    const float peak = vf_hmax(top);
    float decay;
    vf_store_n(&decay, vf_exp(vf_set1(c->peak[row] - peak)), 1); /* 0 for the first tile */
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

/* Packs columns [d, d + GEMM_NP) of n rows of V as B, zero beyond them. */
PM_INLINE void FN(pack_values)(const E *const rows[GEMM_NP], long n, long d, long D, uint32_t *b)
{
    for (long p = 0; p < GEMM_NP; p += STEP, b += GEMM_NP) {
        if (p >= n) {
            memset(b, 0, GEMM_NP * sizeof *b);
            continue;
        }
        for (long j = 0; j < GEMM_NP; j += VW) {
            const long lanes = pm_min(VW, D - d - j);
            if (lanes <= 0) {
                memset(b + j, 0, VW * sizeof *b);
                continue;
            }
#if PAIRS
            /* A lone last key is paired with itself; its partner's probability is 0. */
            vb_interleave_n(b + j, rows[p] + d + j, rows[p + 1] + d + j, lanes);
#else
            const E *from = rows[p] + d + j;
            vf_store((float *)b + j, lanes == VW ? e_load(from) : e_load_n(from, lanes));
#endif
        }
    }
}

/* The rows of a key tile: this KV head of n positions from `first` on, the last repeated to the end;
 * none for n <= 0. Starts loading them. */
PM_INLINE void FN(find_tile)(const FN(paged) * view, long first, long n, long D,
                             const E *rows[GEMM_NP])
{
    long block = first / view->block_tokens, in_block = first % view->block_tokens;
    for (long i = 0; i < n; block++, in_block = 0) {
        const E *row = FN(block_row)(view, block) + in_block * view->token_stride;
        const long end = pm_min(n, i + view->block_tokens - in_block);
        for (; i < end; i++, row += view->token_stride) {
            rows[i] = row;
            for (long at = 0; at < D * (long)sizeof(E); at += 64)
                __builtin_prefetch((const char *)row + at);
        }
    }
    for (long i = pm_max(n, 1); i < GEMM_NP && n > 0; i++)
        rows[i] = rows[n - 1];
}

PM_TARGET static void FN(attention)(const void *argument, long number, void *memory)
{
    const pm_attention_job *job = argument;
    const pm_attention_item item = pm_attention_locate(job, number);
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

    const E *k[GEMM_NP], *v[GEMM_NP];
    FN(find_tile)(&keys, 0, pm_min(GEMM_NP, seen), D, k);
    for (long first = 0; first < seen; first += GEMM_NP) {
        const long n = pm_min(GEMM_NP, seen - first), next = first + GEMM_NP;
        /* Queries before this tile see nothing of it. */
        const long hidden = pm_max(0, first - before - item.query_lo) * group;
        FN(find_tile)(&values, first, n, D, v);
        FN(pack_rows)(k, D, c.b);
        FN(find_tile)(&keys, next, pm_min(GEMM_NP, seen - next), D, k);
        FN(gemm_rows)(c.q + hidden * dk, dk, c.b, dk / STEP, c.s + hidden * GEMM_NP, GEMM_NP, 0,
                      rows - hidden);
        for (long r = hidden; r < rows; r++) {
            const long visible = before + item.query_lo + r / group + 1 - first;
            FN(softmax_tile)(&c, r, pm_min(visible, GEMM_NP), job->scale, dv_);
        }
        for (long d = 0; d < D; d += GEMM_NP) {
            FN(pack_values)(v, n, d, D, c.b);
            FN(gemm_rows)(c.p + hidden * GEMM_NP, GEMM_NP, c.b, GEMM_NP / STEP,
                          c.o + hidden * dv_ + d, dv_, 1, rows - hidden);
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
