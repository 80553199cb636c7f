/* Operations as runs of the pool: each chooses how its job is cut into items, which decides speed
 * only. Results: 0, -1 for lack of memory. */
#ifndef PM_PHASES_H
#define PM_PHASES_H

#include "kernels.h"
#include "../pool.h"

#define PM_API __attribute__((visibility("default")))

typedef struct {
    pm_pool *pool;
    const pm_kernels *kernels;
} pm_context;

/* Fields of a job that say how it is cut are filled in here; all others are the caller's. */
int pm_run_linear(const pm_context *context, int dtype, pm_linear_job job);
int pm_run_norm(const pm_context *context, int dtype, pm_norm_job job);
int pm_run_silu_mul(const pm_context *context, int dtype, pm_silu_job job);
int pm_run_rope(const pm_context *context, int dtype, pm_rope_job job);
int pm_run_attention(const pm_context *context, int dtype, pm_attention_job job);

#endif
