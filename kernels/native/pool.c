/* Fork-join pool. One layer of a model needs a handful of runs of a few tens of microseconds each,
 * so a worker spins briefly before it sleeps. A worker that is late (its core is busy with another
 * process) joins whatever is left or finds the job closed: the caller never waits for a worker that
 * has not begun.
 *
 * Each worker has a share of the items that lie side by side, so that what it reads is one stream of
 * memory. One that is done takes over the second half of what is left of the largest share. */
#include "pool.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__)
#define PM_RELAX() __builtin_ia32_pause()
#else
#define PM_RELAX() ((void)0)
#endif

/* About 50 us of `pause` on the processors measured (40 to 65 cycles each): longer than the Python
 * between two operations of a layer, far shorter than a scheduling quantum. */
enum { PM_SPINS = 3000 };

typedef struct {
    void *memory;
    size_t bytes;
} pm_scratch;

/* Items [low 32 bits, high 32 bits) that a worker has not begun, in one word: owner and thieves change
 * it by compare-and-swap. No item comes twice within a job, so an equal word is the same share. */
typedef struct {
    _Alignas(64) uint64_t items;
} pm_share;

struct pm_pool {
    int threads;
    int started;
    pthread_t *handles;
    pm_scratch *scratch; /* one per worker, the caller's first */
    pm_share *shares;    /* likewise */
    pthread_mutex_t turn; /* held by the caller of pm_pool_run */

    pthread_mutex_t mutex; /* guards sleeping on the two conditions */
    pthread_cond_t posted;
    pthread_cond_t drained;

    /* The job, written by the caller while `open` is 0 and `active` is 0. */
    pm_task task;
    const void *job;

    /* Shared words, apart from what is only read. */
    _Alignas(64) unsigned generation;
    int open;
    int stop;
    int sleepers;
    _Alignas(64) int active;
    int caller_sleeps;
};

typedef struct {
    pm_pool *pool;
    int index;
} pm_worker;

static uint64_t share_of(long begin, long end) { return (uint64_t)begin | (uint64_t)end << 32; }
static long share_begin(uint64_t share) { return (long)(share & 0xffffffffu); }
static long share_end(uint64_t share) { return (long)(share >> 32); }

/* Splits off the second half of the largest share; empty when there is nothing left. */
static uint64_t steal(pm_pool *pool)
{
    for (;;) {
        uint64_t largest = 0;
        int victim = -1;
        for (int i = 0; i < pool->threads; i++) {
            uint64_t share = __atomic_load_n(&pool->shares[i].items, __ATOMIC_RELAXED);
            if (share_end(share) - share_begin(share) > share_end(largest) - share_begin(largest)) {
                largest = share;
                victim = i;
            }
        }
        if (victim < 0)
            return 0;
        const long begin = share_begin(largest), end = share_end(largest);
        const long middle = begin + (end - begin) / 2;
        if (__atomic_compare_exchange_n(&pool->shares[victim].items, &largest,
                                        share_of(begin, middle), 0, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED))
            return share_of(middle, end);
    }
}

static void work(pm_pool *pool, int worker)
{
    void *scratch = pool->scratch[worker].memory;
    uint64_t *own = &pool->shares[worker].items;
    for (;;) {
        uint64_t share = __atomic_load_n(own, __ATOMIC_RELAXED);
        long item = share_begin(share);
        if (item < share_end(share)) {
            if (!__atomic_compare_exchange_n(own, &share, share_of(item + 1, share_end(share)), 0,
                                             __ATOMIC_RELAXED, __ATOMIC_RELAXED))
                continue;
        } else {
            share = steal(pool);
            item = share_begin(share);
            if (item == share_end(share))
                return;
            __atomic_store_n(own, share_of(item + 1, share_end(share)), __ATOMIC_RELAXED);
        }
        pool->task(pool->job, item, scratch);
    }
}

/* Blocks until a generation other than `seen` is posted (or stop). */
static unsigned await_post(pm_pool *pool, unsigned seen)
{
    unsigned now;
    for (int spin = 0; spin < PM_SPINS; spin++) {
        now = __atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE);
        if (now != seen)
            return now;
        PM_RELAX();
    }
    pthread_mutex_lock(&pool->mutex);
    __atomic_add_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
    while ((now = __atomic_load_n(&pool->generation, __ATOMIC_SEQ_CST)) == seen)
        pthread_cond_wait(&pool->posted, &pool->mutex);
    __atomic_sub_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&pool->mutex);
    return now;
}

static void *worker_main(void *argument)
{
    pm_worker self = *(pm_worker *)argument;
    pm_pool *pool = self.pool;
    unsigned seen = 0;
    free(argument);
    for (;;) {
        seen = await_post(pool, seen);
        if (__atomic_load_n(&pool->stop, __ATOMIC_ACQUIRE))
            return NULL;
        /* Announce first, look second: once the caller has closed the job and seen nobody active,
         * no worker can still touch the job's fields. */
        __atomic_add_fetch(&pool->active, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&pool->open, __ATOMIC_SEQ_CST)) {
            seen = __atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE);
            work(pool, self.index);
        }
        if (__atomic_sub_fetch(&pool->active, 1, __ATOMIC_SEQ_CST) == 0 &&
            __atomic_load_n(&pool->caller_sleeps, __ATOMIC_SEQ_CST)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->drained);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

static void post(pm_pool *pool)
{
    __atomic_add_fetch(&pool->generation, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool->sleepers, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->posted);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static void await_drained(pm_pool *pool)
{
    for (int spin = 0; spin < PM_SPINS; spin++) {
        if (__atomic_load_n(&pool->active, __ATOMIC_SEQ_CST) == 0)
            return;
        PM_RELAX();
    }
    pthread_mutex_lock(&pool->mutex);
    __atomic_store_n(&pool->caller_sleeps, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&pool->active, __ATOMIC_SEQ_CST) != 0)
        pthread_cond_wait(&pool->drained, &pool->mutex);
    __atomic_store_n(&pool->caller_sleeps, 0, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&pool->mutex);
}

static int reserve(pm_pool *pool, int workers, size_t bytes)
{
    for (int i = 0; i < workers; i++) {
        pm_scratch *s = &pool->scratch[i];
        void *memory;
        if (s->bytes >= bytes)
            continue;
        if (posix_memalign(&memory, 64, bytes) != 0)
            return -1;
        free(s->memory);
        s->memory = memory;
        s->bytes = bytes;
    }
    return 0;
}

int pm_pool_run(pm_pool *pool, pm_task task, const void *job, long items, size_t scratch_bytes)
{
    int alone = pool->threads == 1 || items <= 1;
    pthread_mutex_lock(&pool->turn);
    if (reserve(pool, alone ? 1 : pool->threads, scratch_bytes) != 0) {
        pthread_mutex_unlock(&pool->turn);
        return -1;
    }
    if (alone) {
        for (long item = 0; item < items; item++)
            task(job, item, pool->scratch[0].memory);
    } else {
        pool->task = task;
        pool->job = job;
        for (int i = 0; i < pool->threads; i++)
            __atomic_store_n(&pool->shares[i].items,
                             share_of(items * i / pool->threads, items * (i + 1) / pool->threads),
                             __ATOMIC_RELAXED);
        __atomic_store_n(&pool->open, 1, __ATOMIC_SEQ_CST);
        post(pool);
        work(pool, 0);
        __atomic_store_n(&pool->open, 0, __ATOMIC_SEQ_CST);
        await_drained(pool);
    }
    pthread_mutex_unlock(&pool->turn);
    return 0;
}

pm_pool *pm_pool_new(int threads)
{
    pm_pool *pool;
    if (posix_memalign((void **)&pool, 64, sizeof *pool) != 0)
        return NULL;
    *pool = (pm_pool){.threads = threads};
    if (posix_memalign((void **)&pool->shares, 64, (size_t)threads * sizeof *pool->shares) != 0)
        pool->shares = NULL;
    pthread_mutex_init(&pool->turn, NULL);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->posted, NULL);
    pthread_cond_init(&pool->drained, NULL);
    pool->scratch = calloc((size_t)threads, sizeof *pool->scratch);
    pool->handles = calloc((size_t)threads, sizeof *pool->handles);
    if (pool->shares == NULL || pool->scratch == NULL || pool->handles == NULL) {
        pm_pool_free(pool);
        return NULL;
    }
    for (int i = 1; i < threads; i++) {
        pm_worker *self = malloc(sizeof *self);
        if (self != NULL)
            *self = (pm_worker){.pool = pool, .index = i};
        if (self == NULL || pthread_create(&pool->handles[i], NULL, worker_main, self) != 0) {
            free(self);
            pm_pool_free(pool);
            return NULL;
        }
        pool->started = i;
    }
    return pool;
}

void pm_pool_free(pm_pool *pool)
{
    __atomic_store_n(&pool->stop, 1, __ATOMIC_SEQ_CST);
    post(pool);
    for (int i = 1; i <= pool->started; i++)
        pthread_join(pool->handles[i], NULL);
    if (pool->scratch != NULL)
        for (int i = 0; i < pool->threads; i++)
            free(pool->scratch[i].memory);
    free(pool->shares);
    free(pool->scratch);
    free(pool->handles);
    pthread_cond_destroy(&pool->posted);
    pthread_cond_destroy(&pool->drained);
    pthread_mutex_destroy(&pool->mutex);
    pthread_mutex_destroy(&pool->turn);
    free(pool);
}

int pm_pool_threads(const pm_pool *pool) { return pool->threads; }
