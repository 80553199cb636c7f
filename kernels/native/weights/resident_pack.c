/* A matrix to the resident form, on the workers of a pool. */
#include "resident_pack.h"

#include <string.h>

#include "../forward/phases.h"

enum {
    PM_TOO_MANY_ESCAPES = -2,
    PM_PACK_TILES = 16, /* of an item */
};

static void count_exponents(const uint16_t *rows, long N, long K, long ld, long step,
                            long counts[256])
{
    long lanes[4][256]; /* so that equal neighbours do not wait for each other */
    memset(lanes, 0, sizeof lanes);
    for (long n = 0; n < N; n += step) {
        const uint16_t *row = rows + n * ld;
        for (long k = 0; k < K; k++)
            lanes[k & 3][row[k] >> 7 & 0xff]++;
    }
    for (int e = 0; e < 256; e++)
        counts[e] = lanes[0][e] + lanes[1][e] + lanes[2][e] + lanes[3][e];
}

void pm_palette_by(const long counts[256], uint8_t palette[PM_PALETTE])
{
    int taken = 0;
    uint8_t chosen[256] = {0};
    for (int i = 0; i < PM_PALETTE; i++) {
        int best = -1;
        for (int e = 0; e < 256; e++)
            if (!chosen[e] && (best < 0 || counts[e] > counts[best]))
                best = e;
        chosen[best] = 1;
    }
    for (int e = 0; e < 256; e++)
        if (chosen[e])
            palette[taken++] = (uint8_t)e;
}

void pm_choose_palette(const uint16_t *rows, long N, long K, long ld, long sample,
                       uint8_t palette[PM_PALETTE])
{
    long counts[256];
    count_exponents(rows, N, K, ld, pm_max(1, N * K / sample), counts);
    pm_palette_by(counts, palette);
}

typedef struct {
    const pm_kernels *kernels;
    pm_pack_part whole;
    uint32_t *starts;
} pm_pack_job;

static long tiles_of(const pm_pack_job *job) { return pm_ceil_div(job->whole.N, PM_TILE_ROWS); }

/* Packs tile `tile`, listing `room` escapes at `keys`; returns how many there are. */
static long pack_tile(const pm_pack_job *job, long tile, uint64_t *keys, long room)
{
    pm_pack_part part = job->whole;
    part.rows += tile * PM_TILE_ROWS * part.ld;
    part.N = pm_min(PM_TILE_ROWS, part.N - tile * PM_TILE_ROWS);
    part.tiles += tile * part.tile_bytes;
    part.tile = tile;
    part.keys = keys;
    part.room = room;
    return job->kernels->pack(&part);
}

static void pack_tiles(const void *argument, long item, void *scratch)
{
    const pm_pack_job *job = argument;
    const long end = pm_min(tiles_of(job), (item + 1) * PM_PACK_TILES);
    (void)scratch;
    for (long tile = item * PM_PACK_TILES; tile < end; tile++)
        job->starts[tile + 1] = (uint32_t)pack_tile(job, tile, NULL, 0);
}

static void list_escapes(const void *argument, long item, void *scratch)
{
    const pm_pack_job *job = argument;
    const long end = pm_min(tiles_of(job), (item + 1) * PM_PACK_TILES);
    (void)scratch;
    for (long tile = item * PM_PACK_TILES; tile < end; tile++)
        if (job->starts[tile] < job->starts[tile + 1])
            pack_tile(job, tile, job->whole.keys + job->starts[tile],
                      job->starts[tile + 1] - job->starts[tile]);
}

/* Fills `tiles`, `starts` and up to `room` keys, see pm_pack_part; chooses `palette` by about `sample`
 * weights. Returns the number of escapes, -1 for lack of memory, -2 where there are more than `room`. */
PM_API long pm_resident_pack(const pm_context *context, const uint16_t *rows, long N, long K, long ld,
                             long sample, uint8_t palette[PM_PALETTE], uint8_t *tiles,
                             uint32_t *starts, uint64_t *keys, long room)
{
    const pm_pack_job job = {
        .kernels = context->kernels,
        .whole = {.rows = rows, .N = N, .K = K, .ld = ld, .tiles = tiles,
                  .tile_bytes = pm_ceil_div(K, PM_GROUP_COLUMNS) * PM_GROUP_BYTES,
                  .palette = palette, .keys = keys},
        .starts = starts,
    };
    const long items = pm_ceil_div(tiles_of(&job), PM_PACK_TILES);
    long total = 0;
    pm_choose_palette(rows, N, K, ld, sample, palette);
    if (pm_pool_run(context->pool, pack_tiles, &job, items, 0))
        return -1;
    starts[0] = 0;
    for (long tile = 0; tile < tiles_of(&job); tile++) {
        total += starts[tile + 1];
        if (total > room)
            return PM_TOO_MANY_ESCAPES;
        starts[tile + 1] = (uint32_t)total;
    }
    return pm_pool_run(context->pool, list_escapes, &job, items, 0) ? -1 : total;
}
