/* A small fork-join pool: `threads` workers including the caller, and scratch memory per worker. */
#ifndef PM_POOL_H
#define PM_POOL_H

#include <stddef.h>

typedef struct pm_pool pm_pool;

/* Runs one item. `scratch` is 64-byte aligned, private to the worker, of the size asked for. */
typedef void (*pm_task)(const void *job, long item, void *scratch);

/* Starts threads - 1 threads (none for 1). NULL when memory or threads are lacking. */
pm_pool *pm_pool_new(int threads);
/* Joins the threads and frees everything. No call may be in flight. */
void pm_pool_free(pm_pool *pool);
int pm_pool_threads(const pm_pool *pool);

/* Runs items 0..items-1 < 2^32, in any order, and returns when all are done. Calls from several threads
 * take turns. Returns 0, or -1 when scratch memory could not be had (nothing has run then). */
int pm_pool_run(pm_pool *pool, pm_task task, const void *job, long items, size_t scratch_bytes);

#endif
