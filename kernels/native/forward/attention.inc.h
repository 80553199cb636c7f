/* Causal attention over the paged cache for one element type. One item is one KV head of one sequence
 * for a block of its queries: online softmax over key tiles of GEMM_NP, both products through the
 * gemm tile. Scores and sums are float32; probabilities are rounded to A for the second product.
 *
 * Tiles are counted from position 0, whatever the first query, and a decode step is a block of one
 * query. So the bits of a query's result are a function of its position, its own vector and the keys
 * and values up to it: not of the chunk it came in, the blocks they lie in, or the threads.
 *
 * A tile is packed once for all rows of the item, which then pass through scores, probabilities and
 * sums a part at a time. While it is packed, the same lines of the next tile are asked for.
 *
 * Roofline: decode reads 4 Hk D bytes (bf16) per cached token and multiplies 2 Hq D times. 16
 * sequences of 512 tokens take 0.27 ms on one Zen 5 core for Hq 9, Hk 3, D 64 (24 GB/s, caches
 * helping; packing bounds it). A chunk is bound by arithmetic: 512 tokens take 1.05 ms on that core,
 * 512 behind 1,536 others 6.0 ms: 173 billion multiply-adds/s, exponentials included.
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

/* Scratch of an item: M = q_block * group rows. Arrays that are read by whole vectors have room for
 * one more. */
typedef struct {
    A *q;          /* [M][Dk], Dk = D rounded up to STEP */
    float *o;      /* [M][Dv], Dv = D rounded up to GEMM_NP */
    float *peak;   /* [M + VW]: greatest score so far */
    float *sum;    /* [M + VW] */
    float *s;      /* [PART_ROWS][GEMM_NP] */
    A *p;          /* [PART_ROWS][GEMM_NP] */
    float *top;    /* [PART_ROWS + VW]: what peak becomes */
    float *decay;  /* [PART_ROWS + VW]: what is left of older sums */
    uint32_t *k;   /* K^T [Dk / STEP][GEMM_NP] */
    uint32_t *v;   /* [Dv / GEMM_NP] times V [GEMM_NP / STEP][GEMM_NP] */
    size_t bytes;
} FN(chunk);

static FN(chunk) FN(lay_out)(const pm_attention_job *job, char *memory)
{
    const size_t rows = (size_t)(job->q_block * (job->Hq / job->Hk));
    const size_t dk = (size_t)(pm_ceil_div(job->D, STEP) * STEP);
    const size_t dv_ = (size_t)(pm_ceil_div(job->D, GEMM_NP) * GEMM_NP);
    FN(chunk) c;
    size_t at = 0;
#define PLACE(field, count)                                  \
    c.field = (void *)(memory + at);                         \
    at += pm_round64((size_t)(count) * sizeof *c.field)
    PLACE(q, rows * dk);
    PLACE(o, rows * dv_);
    PLACE(peak, rows + VW);
    PLACE(sum, rows + VW);
    PLACE(s, PART_ROWS * GEMM_NP);
    PLACE(p, PART_ROWS * GEMM_NP);
    PLACE(top, PART_ROWS + VW);
    PLACE(decay, PART_ROWS + VW);
    PLACE(k, dk * GEMM_NP);
    PLACE(v, dv_ * GEMM_NP);
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

#include "softmax.inc.h"

/* Packs columns [d, d + GEMM_NP) of n rows of V as B, zero beyond them. Starts loading `ahead`. */
PM_INLINE void FN(pack_values)(const E *const rows[GEMM_NP], const E *const ahead[GEMM_NP], long n,
                               long d, long D, uint32_t *b)
{
    for (long p = 0; p < GEMM_NP; p += STEP, b += GEMM_NP) {
        for (long i = p; i < p + STEP; i++)
            for (long j = d; j < pm_min(D, d + GEMM_NP); j += 64 / (long)sizeof(E))
                __builtin_prefetch(ahead[i] + j);
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

/* The rows of a key tile: this KV head of n > 0 positions from `first` on, the last repeated to the
 * end. */
PM_INLINE void FN(find_tile)(const FN(paged) * view, long first, long n, const E *rows[GEMM_NP])
{
    long block = first / view->block_tokens, in_block = first % view->block_tokens;
    for (long i = 0; i < n; block++, in_block = 0) {
        const E *row = FN(block_row)(view, block) + in_block * view->token_stride;
        const long end = pm_min(n, i + view->block_tokens - in_block);
        for (; i < end; i++, row += view->token_stride)
            rows[i] = row;
    }
    for (long i = n; i < GEMM_NP; i++)
        rows[i] = rows[n - 1];
}

typedef struct {
    const E *k[GEMM_NP], *v[GEMM_NP];
} FN(tile);

/* The first tile of an item, from `first` on for others. */
PM_INLINE void FN(find_tiles)(const pm_attention_job *job, const pm_attention_item *item, long seen,
                              long first, FN(tile) * tile)
{
    const FN(paged) keys = FN(open_cache)(job, job->k_cache, item->sequence, item->kv_head);
    const FN(paged) values = FN(open_cache)(job, job->v_cache, item->sequence, item->kv_head);
    FN(find_tile)(&keys, first, pm_min(GEMM_NP, seen - first), tile->k);
    FN(find_tile)(&values, first, pm_min(GEMM_NP, seen - first), tile->v);
}

PM_INLINE void FN(load_tile)(const FN(tile) * tile, long D)
{
    for (long i = 0; i < GEMM_NP; i++)
        for (long j = 0; j < D; j += 64 / (long)sizeof(E))
            __builtin_prefetch(tile->k[i] + j);
    for (long i = 0; i < GEMM_NP; i++)
        for (long j = 0; j < D; j += 64 / (long)sizeof(E))
            __builtin_prefetch(tile->v[i] + j);
}

PM_TARGET static void FN(attention)(const void *argument, long number, void *memory)
{
    const pm_attention_job *job = argument;
    const pm_attention_item item = pm_attention_locate(job, number);
    const pm_attention_item after = pm_attention_locate(job, pm_min(number + 1, job->items - 1));
    const long D = job->D, group = job->Hq / job->Hk;
    const long dk = pm_ceil_div(D, STEP) * STEP, dv_ = pm_ceil_div(D, GEMM_NP) * GEMM_NP;
    const long start = job->query_starts[item.sequence];
    const long rows = (item.query_hi - item.query_lo) * group;
    const long seen = pm_attention_keys(job, &item);
    const long before = seen - (item.query_hi - item.query_lo); /* position of the first query */
    const float octaves = job->scale * 1.44269504f; /* e^x = 2^(x log2 e) */
    FN(chunk) c = FN(lay_out)(job, memory);
    FN(tile) tiles[2];

    FN(find_tiles)(job, &item, seen, 0, &tiles[0]);
    FN(load_tile)(&tiles[0], D);
    for (long r = 0; r < rows; r++) { /* rows of a query are its heads */
        const E *q = (const E *)job->q + (start + item.query_lo + r / group) * job->q_stride +
                     (item.kv_head * group + r % group) * D;
        FN(copy_row)(c.q + r * dk, q, D, dk);
        c.peak[r] = -INFINITY;
        c.sum[r] = 0.0f;
    }
    memset(c.o, 0, (size_t)(rows * dv_) * sizeof *c.o);

    for (long first = 0; first < seen; first += GEMM_NP) {
        const long n = pm_min(GEMM_NP, seen - first), next = first + GEMM_NP;
        const FN(tile) *const tile = &tiles[first / GEMM_NP % 2];
        FN(tile) *const ahead = &tiles[next / GEMM_NP % 2];
        if (next < seen)
            FN(find_tiles)(job, &item, seen, next, ahead);
        else
            FN(find_tiles)(job, &after, pm_attention_keys(job, &after), 0, ahead);
        FN(pack_rows)(tile->k, ahead->k, D, c.k);
        for (long d = 0; d < D; d += GEMM_NP)
            FN(pack_values)(tile->v, ahead->v, n, d, D, c.v + d / STEP * GEMM_NP);
        /* Queries before this tile see nothing of it. */
        for (long r = pm_max(0, first - before) * group; r < rows; r += PART_ROWS) {
            const long part = pm_min(PART_ROWS, rows - r);
            FN(gemm_rows)(c.q + r * dk, dk, c.k, dk / STEP, c.s, GEMM_NP, 0, part);
            FN(softmax_part)(&c, r, part, before + 1 - first, group, octaves, dv_);
            for (long d = 0; d < D; d += GEMM_NP)
                FN(gemm_rows)(c.p, GEMM_NP, c.v + d / STEP * GEMM_NP, GEMM_NP / STEP,
                              c.o + r * dv_ + d, dv_, 1, part);
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
