/* The exported operations one by one (forward/decoder.c has a whole model), and the choice of kernels for
 * this processor.
 *
 * All pointers are borrowed for the call; arrays are row-major and contiguous except where a row
 * stride (in elements) is given. dtype: 0 float32, 1 bfloat16. Results: 0, -1 for lack of memory.
 */
#include <stdlib.h>
#include <string.h>

#include "forward/phases.h"

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

/* Kernels for what needs no workers; `isa` "" means the fastest, NULL: this processor lacks it. */
PM_API const pm_kernels *pm_kernels_of(const char *isa) { return find_kernels(isa); }

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

PM_API int pm_linear(pm_context *context, int dtype, const void *x, const void *w, const void *bias,
                     void *y, long T, long N, long K, int y_f32)
{
    return pm_run_linear(context, dtype,
                         (pm_linear_job){.x = x, .w = {w, NULL}, .bias = bias, .y = y, .T = T, .N = N,
                                         .K = K, .y_f32 = y_f32});
}

/* Weights in the resident form; x is bfloat16. */
PM_API int pm_resident_linear(pm_context *context, const void *x, const pm_resident *w,
                              const void *bias, void *y, long T, long N, long K, int y_f32)
{
    return pm_run_linear(context, PM_BF16,
                         (pm_linear_job){.x = x, .w = {NULL, w}, .bias = bias, .y = y, .T = T,
                                         .N = N, .K = K, .y_f32 = y_f32});
}

/* residual and new_residual are NULL for the plain norm. */
PM_API int pm_norm(pm_context *context, int dtype, const void *x, const void *residual,
                   const void *weight, void *out, void *new_residual, long T, long H, float eps)
{
    return pm_run_norm(context, dtype,
                       (pm_norm_job){.x = x, .weight = weight, .residual = residual, .out = out,
                                     .new_residual = new_residual, .T = T, .H = H, .eps = eps});
}

PM_API int pm_silu_mul(pm_context *context, int dtype, const void *gate_up, void *out, long T,
                       long I)
{
    return pm_run_silu_mul(context, dtype,
                           (pm_silu_job){.gate_up = gate_up, .out = out, .T = T, .I = I});
}

PM_API int pm_rope_kv_write(pm_context *context, int dtype, void *q, long q_stride, void *k,
                            long k_stride, const void *v, long v_stride, const float *cos_sin,
                            const int64_t *positions, const int64_t *slots, void *k_cache,
                            void *v_cache, long T, long Hq, long Hk, long D)
{
    return pm_run_rope(context, dtype,
                       (pm_rope_job){.q = q, .k = k, .v = v, .q_stride = q_stride,
                                     .k_stride = k_stride, .v_stride = v_stride,
                                     .cos_sin = cos_sin, .positions = positions, .slots = slots,
                                     .k_cache = k_cache, .v_cache = v_cache, .T = T, .Hq = Hq,
                                     .Hk = Hk, .D = D});
}

PM_API int pm_attention(pm_context *context, int dtype, const void *q, long q_stride,
                        const void *k_cache, const void *v_cache, void *out,
                        const int32_t *query_starts, const int32_t *context_lens,
                        const int32_t *block_tables, long table_stride, long S, long Hq, long Hk,
                        long D, long block_tokens, float scale)
{
    return pm_run_attention(context, dtype,
                            (pm_attention_job){.q = q, .k_cache = k_cache, .v_cache = v_cache,
                                               .out = out, .query_starts = query_starts,
                                               .context_lens = context_lens,
                                               .block_tables = block_tables, .q_stride = q_stride,
                                               .table_stride = table_stride, .S = S, .Hq = Hq,
                                               .Hk = Hk, .D = D, .block_tokens = block_tokens,
                                               .scale = scale});
}

PM_API int pm_sample(pm_context *context, const float *logits, long S, long V,
                     const float *temperature, const float *top_p, const uint64_t *seed,
                     const uint32_t *choice, const uint32_t *index, const uint32_t *top_k,
                     const float *min_z, int64_t *out)
{
    pm_sample_job job = {.logits = logits, .temperature = temperature, .top_p = top_p, .seed = seed,
                         .choice = choice, .index = index, .top_k = top_k, .min_z = min_z,
                         .out = out, .V = V};
    return pm_pool_run(context->pool, context->kernels->sample, &job, S,
                       (top_k ? 3 : 2) * pm_round64((size_t)V * sizeof(float)) + 512);
}

/* kernels/reference/penalties.py, on one row. Products of float32 numbers are exact in double, so it
 * makes no difference whether the compiler fuses them with the subtraction. */
PM_API int pm_penalize(pm_context *context, float *logits, const int32_t *ids,
                       const int32_t *counts, long n, float repetition, float frequency,
                       float presence)
{
    (void)context;
    const double factor = repetition, per_count = frequency, once = presence;
    for (long i = 0; i < n; i++) {
        double l = logits[ids[i]];
        l = l > 0.0 ? l / factor : l * factor;
        logits[ids[i]] = (float)(l - (per_count * counts[i] + (counts[i] > 0 ? once : 0.0)));
    }
    return 0;
}
