/* The exported operations: choose kernels for this processor, split work into items, run the pool.
 *
 * All pointers are borrowed for the call; arrays are row-major and contiguous except where a row
 * stride (in elements) is given. dtype: 0 float32, 1 bfloat16. Results: 0, -1 for lack of memory.
 */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"

#define PM_API __attribute__((visibility("default")))

typedef struct {
    pm_pool *pool;
    const pm_kernels *kernels;
} pm_context;

enum {
    /* Elements of row-wise work that pay for waking a worker: 6 to 10 us of one core (measured). */
    PM_ROWWISE_UNIT = 32768,
    /* Weight elements per item of a linear, about 3 us of memory traffic at bf16: the smallest
     * matrix of a 135M model still splits into ten, so two cores end together. */
    PM_LINEAR_UNIT = 32768,
    /* Beyond one tile of rows: columns per item at least, so that a block of x is loaded into the
     * first cache for many of them; rows per item, elements of K per block, and bytes of a block of
     * x, to leave room in a first cache of 32 KiB. Measured on Zen 5: 64 and 192 columns, 400 and
     * 1000 elements, 14 and 28 KiB are slower. */
    PM_LINEAR_COLUMNS = 96,
    PM_LINEAR_ROWS = 192,
    PM_LINEAR_DEPTH = 768,
    PM_LINEAR_X_BYTES = 20 * 1024,
    /* Rows (queries x heads of a group) of one attention item. */
    PM_CHUNK_ROWS = 96,
};

static const pm_kernels *find_kernels(const char *isa)
{
    const pm_kernels *known[4];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16"))
        known[count++] = &pm_kernels_avx512_bf16;
    if (avx512)
        known[count++] = &pm_kernels_avx512;
    if (avx2)
        known[count++] = &pm_kernels_avx2;
#endif
    known[count++] = &pm_kernels_portable;
    for (int i = 0; i < count; i++)
        if (isa[0] == '\0' || strcmp(isa, known[i]->name) == 0)
            return known[i];
    return NULL;
}

/* Name of the fastest instruction set of this processor that there are kernels for. */
PM_API const char *pm_best_isa(void) { return find_kernels("")->name; }

/* `isa` "" means the fastest. NULL when this processor lacks it, or threads cannot be started. */
PM_API pm_context *pm_open(int threads, const char *isa)
{
    const pm_kernels *kernels = find_kernels(isa);
    pm_context *context = kernels == NULL || threads < 1 ? NULL : malloc(sizeof *context);
    if (context == NULL)
        return NULL;
    context->kernels = kernels;
    context->pool = pm_pool_new(threads);
    if (context->pool == NULL) {
        free(context);
        return NULL;
    }
    return context;
}

PM_API void pm_close(pm_context *context)
{
    pm_pool_free(context->pool);
    free(context);
}

/* Rows per item so that an item holds at least PM_ROWWISE_UNIT elements. */
static long rows_per_item(long row_elements)
{
    return pm_max(1, PM_ROWWISE_UNIT / pm_max(1, row_elements));
}

/* Chooses blocks and items; decides speed only (see linear.inc.h). */
static void plan_linear(pm_linear_job *job, const pm_kernels *kernels, int dtype)
{
    const long tile = kernels->tile_rows, K = pm_max(1, job->K);
    const long blocks = (K + PM_LINEAR_DEPTH / 2) / PM_LINEAR_DEPTH;
    const int one_tile = job->T <= tile;
    job->depth = one_tile || blocks <= 1 ? K : pm_ceil_div(K, blocks * 32) * 32;
    job->rows = PM_LINEAR_X_BYTES / (job->depth * kernels->block_element[dtype]) / tile * tile;
    job->rows = pm_max(1, pm_min(job->T, pm_max(tile, job->rows)));
    job->item_rows = pm_ceil_div(PM_LINEAR_ROWS, job->rows) * job->rows;
    job->row_items = pm_ceil_div(job->T, job->item_rows);
    job->columns = pm_max(one_tile ? 4 : PM_LINEAR_COLUMNS, PM_LINEAR_UNIT / K / 4 * 4);
}

PM_API int pm_linear(pm_context *context, int dtype, const void *x, const void *w, const void *bias,
                     void *y, long T, long N, long K, int y_f32)
{
    const pm_kernels *kernels = context->kernels;
    pm_linear_job job = {.x = x, .w = w, .bias = bias, .y = y, .T = T, .N = N, .K = K,
                         .y_f32 = y_f32};
    plan_linear(&job, kernels, dtype);
    return pm_pool_run(context->pool, kernels->linear[dtype], &job,
                       pm_ceil_div(N, job.columns) * job.row_items,
                       kernels->linear_scratch[dtype](&job));
}

/* residual and new_residual are NULL for the plain norm. */
PM_API int pm_norm(pm_context *context, int dtype, const void *x, const void *residual,
                   const void *weight, void *out, void *new_residual, long T, long H, float eps)
{
    pm_norm_job job = {.x = x, .weight = weight, .residual = residual, .out = out,
                       .new_residual = new_residual, .T = T, .H = H, .eps = eps,
                       .unit = rows_per_item(H)};
    return pm_pool_run(context->pool, context->kernels->norm[dtype], &job,
                       pm_ceil_div(T, job.unit), 0);
}

PM_API int pm_silu_mul(pm_context *context, int dtype, const void *gate_up, void *out, long T,
                       long I)
{
    pm_silu_job job = {.gate_up = gate_up, .out = out, .T = T, .I = I,
                       .unit = rows_per_item(2 * I)};
    return pm_pool_run(context->pool, context->kernels->silu_mul[dtype], &job,
                       pm_ceil_div(T, job.unit), 0);
}

PM_API int pm_rope_kv_write(pm_context *context, int dtype, void *q, long q_stride, void *k,
                            long k_stride, const void *v, long v_stride, const float *cos_sin,
                            const int64_t *positions, const int64_t *slots, void *k_cache,
                            void *v_cache, long T, long Hq, long Hk, long D)
{
    pm_rope_job job = {.q = q, .k = k, .v = v, .q_stride = q_stride, .k_stride = k_stride,
                       .v_stride = v_stride, .cos_sin = cos_sin, .positions = positions,
                       .slots = slots, .k_cache = k_cache, .v_cache = v_cache, .T = T, .Hq = Hq,
                       .Hk = Hk, .D = D, .unit = rows_per_item((Hq + 2 * Hk) * D)};
    return pm_pool_run(context->pool, context->kernels->rope[dtype], &job,
                       pm_ceil_div(T, job.unit), 0);
}

static long query_items(const pm_attention_job *job, long sequence)
{
    long queries = job->query_starts[sequence + 1] - job->query_starts[sequence];
    return pm_ceil_div(queries, job->q_block);
}

long pm_attention_items(const pm_attention_job *job)
{
    long items = 0;
    for (long s = 0; s < job->S; s++)
        items += query_items(job, s) * job->Hk;
    return items;
}

/* Within a sequence the last queries come first: they see the most keys, and the longest items
 * should not be the last to start. */
pm_attention_item pm_attention_locate(const pm_attention_job *job, long item)
{
    long sequence = 0, blocks;
    while (item >= (blocks = query_items(job, sequence)) * job->Hk) {
        item -= blocks * job->Hk;
        sequence++;
    }
    long queries = job->query_starts[sequence + 1] - job->query_starts[sequence];
    long lo = (blocks - 1 - item / job->Hk) * job->q_block;
    pm_attention_item found = {sequence, item % job->Hk, lo, pm_min(queries, lo + job->q_block)};
    return found;
}

PM_API int pm_attention(pm_context *context, int dtype, const void *q, long q_stride,
                        const void *k_cache, const void *v_cache, void *out,
                        const int32_t *query_starts, const int32_t *context_lens,
                        const int32_t *block_tables, long table_stride, long S, long Hq, long Hk,
                        long D, long block_tokens, float scale)
{
    pm_attention_job job = {.q = q, .k_cache = k_cache, .v_cache = v_cache, .out = out,
                            .query_starts = query_starts, .context_lens = context_lens,
                            .block_tables = block_tables, .q_stride = q_stride,
                            .table_stride = table_stride, .S = S, .Hq = Hq, .Hk = Hk, .D = D,
                            .block_tokens = block_tokens,
                            .scale = scale, .q_block = pm_max(1, PM_CHUNK_ROWS / (Hq / Hk))};
    return pm_pool_run(context->pool, context->kernels->attention[dtype], &job,
                       pm_attention_items(&job), context->kernels->attention_scratch[dtype](&job));
}

PM_API int pm_sample(pm_context *context, const float *logits, long S, long V,
                     const float *temperature, const float *top_p, const uint64_t *seed,
                     const uint32_t *choice, const uint32_t *index, int64_t *out)
{
    pm_sample_job job = {.logits = logits, .temperature = temperature, .top_p = top_p, .seed = seed,
                         .choice = choice, .index = index, .out = out, .V = V};
    return pm_pool_run(context->pool, context->kernels->sample, &job, S,
                       2 * pm_round64((size_t)V * sizeof(float)) + 512);
}
