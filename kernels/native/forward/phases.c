#include "phases.h"

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
    /* Resident weights: bytes of x with which 4 decoded rows stay in the first cache, K in blocks.
     * Beyond: bytes of decoded rows in that cache, past which x streams out of the second, and of x
     * there; where x is wider than that, rows of a block at least, so that decoding is one part in
     * twelve. Measured on Zen 5: 28 KiB for the first, and 8 KiB for the second, are slower. */
    PM_RESIDENT_NEAR_X_BYTES = 40 * 1024,
    PM_RESIDENT_PANEL_BYTES = 16 * 1024,
    PM_RESIDENT_X_BYTES = 640 * 1024,
    PM_RESIDENT_BLOCK_ROWS = 48,
    /* Rows (queries x heads of a group) of one attention item: 96 take 2 % longer, 192 1 % less, but
     * leave 24 items of a chunk of 512. */
    PM_CHUNK_ROWS = 144,
};

/* Rows per item so that an item holds at least PM_ROWWISE_UNIT elements. */
static long rows_per_item(long row_elements)
{
    return pm_max(1, PM_ROWWISE_UNIT / pm_max(1, row_elements));
}

/* The same for resident weights (see resident.inc.h), where all of K is a block if 4 rows allow it. */
static void plan_resident(pm_linear_job *job, const pm_kernels *kernels, int dtype)
{
    const long tile = kernels->tile_rows, K = pm_max(1, job->K);
    const long element = kernels->block_element[dtype], four = PM_TILE_ROWS * element;
    job->fused = kernels->fuses && job->T <= tile;
    job->rows = pm_max(1, job->T);
    if (job->fused)
        job->depth = K;
    else if (job->T * job->depth * element > PM_RESIDENT_NEAR_X_BYTES) {
        if (K * four <= PM_RESIDENT_PANEL_BYTES)
            job->depth = K;
        job->panel = pm_max(1, PM_RESIDENT_PANEL_BYTES / (job->depth * four)) * PM_TILE_ROWS;
        job->rows = pm_max(PM_RESIDENT_X_BYTES / (K * element),
                           job->depth < K ? PM_RESIDENT_BLOCK_ROWS : tile);
        job->rows = pm_min(job->T, job->rows / tile * tile);
    }
    job->item_rows = job->rows;
}

/* Chooses blocks and items (see linear.inc.h). */
static void plan_linear(pm_linear_job *job, const pm_kernels *kernels, int dtype)
{
    const long tile = kernels->tile_rows, K = pm_max(1, job->K);
    const long blocks = (K + PM_LINEAR_DEPTH / 2) / PM_LINEAR_DEPTH;
    const long unit = job->w.rows == NULL ? PM_GROUP_COLUMNS : 32;
    const int one_tile = job->T <= tile;
    job->depth = one_tile || blocks <= 1 ? K : pm_ceil_div(K, blocks * unit) * unit;
    /* All rows as one block, if they fit: then w is read once. Else whole tiles. */
    const long fit = PM_LINEAR_X_BYTES / (job->depth * kernels->block_element[dtype]);
    job->rows = pm_max(1, job->T <= fit ? job->T : pm_min(job->T, pm_max(tile, fit / tile * tile)));
    job->item_rows = PM_LINEAR_ROWS;
    job->panel = 4;
    if (job->w.rows == NULL)
        plan_resident(job, kernels, dtype);
    job->item_rows = pm_ceil_div(job->item_rows, job->rows) * job->rows;
    job->row_items = pm_ceil_div(job->T, job->item_rows);
    job->columns = pm_max(one_tile ? 4 : PM_LINEAR_COLUMNS, PM_LINEAR_UNIT / K / 4 * 4);
}

int pm_run_linear(const pm_context *context, int dtype, pm_linear_job job)
{
    const pm_kernels *kernels = context->kernels;
    plan_linear(&job, kernels, dtype);
    return pm_pool_run(context->pool, kernels->linear[dtype], &job,
                       pm_ceil_div(job.N, job.columns) * job.row_items,
                       kernels->linear_scratch[dtype](&job));
}

int pm_run_norm(const pm_context *context, int dtype, pm_norm_job job)
{
    job.unit = rows_per_item(job.H);
    return pm_pool_run(context->pool, context->kernels->norm[dtype], &job,
                       pm_ceil_div(job.T, job.unit), 0);
}

int pm_run_silu_mul(const pm_context *context, int dtype, pm_silu_job job)
{
    job.unit = rows_per_item(2 * job.I);
    return pm_pool_run(context->pool, context->kernels->silu_mul[dtype], &job,
                       pm_ceil_div(job.T, job.unit), 0);
}

int pm_run_rope(const pm_context *context, int dtype, pm_rope_job job)
{
    job.unit = rows_per_item((job.Hq + 2 * job.Hk) * job.D);
    return pm_pool_run(context->pool, context->kernels->rope[dtype], &job,
                       pm_ceil_div(job.T, job.unit), 0);
}

static long query_items(const pm_attention_job *job, long sequence)
{
    long queries = job->query_starts[sequence + 1] - job->query_starts[sequence];
    return pm_ceil_div(queries, job->q_block);
}

static long attention_items(const pm_attention_job *job)
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

long pm_attention_keys(const pm_attention_job *job, const pm_attention_item *item)
{
    const long queries = job->query_starts[item->sequence + 1] - job->query_starts[item->sequence];
    return job->context_lens[item->sequence] - queries + item->query_hi;
}

int pm_run_attention(const pm_context *context, int dtype, pm_attention_job job)
{
    job.q_block = pm_max(1, PM_CHUNK_ROWS / (job.Hq / job.Hk));
    job.items = attention_items(&job);
    return pm_pool_run(context->pool, context->kernels->attention[dtype], &job, job.items,
                       context->kernels->attention_scratch[dtype](&job));
}
