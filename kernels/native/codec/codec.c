/* Which instruction set codes, and on how many threads. */
#include "codec_block.h"

const pm_codec_kernels *pm_codec_find(const char *isa)
{
    const pm_codec_kernels *known[4];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        known[count++] = &pm_codec_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"))
        known[count++] = &pm_codec_avx2;
    if (__builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("popcnt"))
        known[count++] = &pm_codec_sse41;
#elif defined(__aarch64__) && defined(__ARM_NEON)
    known[count++] = &pm_codec_neon;
#endif
    known[count++] = &pm_codec_portable;
    for (int i = 0; i < count; i++)
        if (isa[0] == '\0' || strcmp(isa, known[i]->name) == 0)
            return known[i];
    return NULL;
}

/* The fastest instruction set of this processor that there is a codec for. */
PM_API const char *pm_codec_isa(void) { return pm_codec_find("")->name; }

int pm_codec_spread(pm_task task, const void *job, long items, int threads)
{
    pm_pool *pool = NULL;
    if (threads > items)
        threads = (int)items;
    if (threads > 1 && (pool = pm_pool_new(threads)) == NULL)
        return PM_CODEC_NO_MEMORY;
    if (pool == NULL) {
        for (long item = 0; item < items; item++)
            task(job, item, NULL);
        return 0;
    }
    int result = pm_pool_run(pool, task, job, items, 0);
    pm_pool_free(pool);
    return result;
}
