/* To the resident form, on the workers of a pool, and single rows back from it. */
#include "resident.h"

#include <string.h>

#include "../forward/phases.h"

enum { PM_TOO_MANY_ESCAPES = -2, PM_PACK_TILES = 16 };

typedef struct {
    const uint16_t *rows; /* [N][K], row_stride elements apart */
    long N, K, row_stride;
    uint8_t code_of[256]; /* by exponent; PM_PALETTE: none */
    uint8_t *tiles;
    uint32_t *starts, *escapes;
} pm_pack_job;

static long tiles_of(const pm_pack_job *job) { return pm_ceil_div(job->N, PM_TILE_ROWS); }

static int exponent_of(uint16_t bits) { return bits >> 7 & 0xff; }

static int place_of(int column) { return column / 8 % 4 * 16 + column / 32 * 8 + column % 8; }

/* One row of a group, n <= 64 columns: its bytes, and its codes without the other row's. Returns how
 * many exponents had no code; they get code 0. */
static long pack_row(const pm_pack_job *job, const uint16_t *row, long n, uint8_t *bytes,
                     uint8_t *codes)
{
    uint16_t whole[PM_GROUP_COLUMNS] = {0};
    uint8_t plain[PM_GROUP_COLUMNS], code[PM_GROUP_COLUMNS];
    long missing = 0;
    memcpy(whole, row, (size_t)n * sizeof *row);
    for (int c = 0; c < PM_GROUP_COLUMNS; c++)
        plain[c] = (uint8_t)((whole[c] >> 8 & 0x80) | (whole[c] & 0x7f));
    for (int c = 0; c < n; c++) {
        int found = job->code_of[exponent_of(whole[c])];
        missing += found == PM_PALETTE;
        code[c] = found & (PM_PALETTE - 1);
    }
    memset(code + n, 0, (size_t)(PM_GROUP_COLUMNS - n));
    for (int run = 0; run < PM_GROUP_COLUMNS; run += 8) {
        memcpy(bytes + place_of(run), plain + run, 8);
        memcpy(codes + place_of(run), code + run, 8);
    }
    return missing;
}

/* Planes of one tile; returns the number of its escapes. */
static long pack_tile(const pm_pack_job *job, long tile)
{
    const long groups = pm_ceil_div(job->K, PM_GROUP_COLUMNS);
    uint8_t *out = job->tiles + tile * groups * PM_GROUP_BYTES;
    long missing = 0;
    for (long g = 0; g < groups; g++, out += PM_GROUP_BYTES) {
        const long k = g * PM_GROUP_COLUMNS, n = pm_min(PM_GROUP_COLUMNS, job->K - k);
        uint8_t codes[PM_TILE_ROWS][PM_GROUP_COLUMNS];
        for (int r = 0; r < PM_TILE_ROWS; r++) {
            const long row = tile * PM_TILE_ROWS + r;
            uint8_t *bytes = out + r * PM_GROUP_COLUMNS;
            if (row < job->N) {
                missing += pack_row(job, job->rows + row * job->row_stride + k, n, bytes, codes[r]);
            } else {
                memset(bytes, 0, PM_GROUP_COLUMNS);
                memset(codes[r], 0, PM_GROUP_COLUMNS);
            }
        }
        for (int i = 0; i < 2 * PM_GROUP_COLUMNS; i++) {
            const int pair = i / PM_GROUP_COLUMNS * 2, at = i % PM_GROUP_COLUMNS;
            out[PM_GROUP_CODES + i] = (uint8_t)(codes[pair][at] | codes[pair + 1][at] << 4);
        }
    }
    return missing;
}

static void pack_tiles(const void *argument, long item, void *scratch)
{
    const pm_pack_job *job = argument;
    const long end = pm_min(tiles_of(job), (item + 1) * PM_PACK_TILES);
    (void)scratch;
    for (long tile = item * PM_PACK_TILES; tile < end; tile++)
        job->starts[tile + 1] = (uint32_t)pack_tile(job, tile);
}

static void list_escapes(const pm_pack_job *job, long tile)
{
    uint32_t *out = job->escapes + job->starts[tile];
    if (job->starts[tile] == job->starts[tile + 1])
        return;
    for (long k = 0; k < job->K; k += PM_GROUP_COLUMNS)
        for (long r = 0; r < pm_min(PM_TILE_ROWS, job->N - tile * PM_TILE_ROWS); r++) {
            const uint16_t *row = job->rows + (tile * PM_TILE_ROWS + r) * job->row_stride + k;
            for (long c = 0; c < pm_min(PM_GROUP_COLUMNS, job->K - k); c++)
                if (job->code_of[exponent_of(row[c])] == PM_PALETTE)
                    *out++ = (uint32_t)(k / PM_GROUP_COLUMNS << 16 | r << 14 | c << 8) |
                             (uint32_t)exponent_of(row[c]);
        }
}

static void list_all_escapes(const void *argument, long item, void *scratch)
{
    const pm_pack_job *job = argument;
    const long end = pm_min(tiles_of(job), (item + 1) * PM_PACK_TILES);
    (void)scratch;
    for (long tile = item * PM_PACK_TILES; tile < end; tile++)
        list_escapes(job, tile);
}

/* counts[e]: how often exponent e occurs in every `step`-th row. */
PM_API void pm_resident_count(const uint16_t *rows, long N, long K, long row_stride, long step,
                              int64_t counts[256])
{
    uint32_t lanes[4][256]; /* so that equal neighbours do not wait for each other */
    memset(counts, 0, 256 * sizeof *counts);
    for (long n = 0; n < N; n += step) {
        const uint16_t *row = rows + n * row_stride;
        memset(lanes, 0, sizeof lanes);
        for (long k = 0; k < K; k++)
            lanes[k & 3][exponent_of(row[k])]++;
        for (int e = 0; e < 256; e++)
            counts[e] += lanes[0][e] + (int64_t)lanes[1][e] + lanes[2][e] + lanes[3][e];
    }
}

/* Fills `tiles`, `starts` and up to `room` escapes. Returns the number of escapes, -1 for lack of
 * memory, -2 where there are more than `room`. */
PM_API long pm_resident_pack(const pm_context *context, const uint16_t *rows, long N, long K,
                             long row_stride, const uint8_t palette[PM_PALETTE], uint8_t *tiles,
                             uint32_t *starts, uint32_t *escapes, long room)
{
    pm_pack_job job = {.rows = rows, .N = N, .K = K, .row_stride = row_stride, .tiles = tiles,
                       .starts = starts, .escapes = escapes};
    const long items = pm_ceil_div(tiles_of(&job), PM_PACK_TILES);
    long total = 0;
    memset(job.code_of, PM_PALETTE, sizeof job.code_of);
    for (int code = PM_PALETTE - 1; code >= 0; code--)
        job.code_of[palette[code]] = (uint8_t)code;
    if (pm_pool_run(context->pool, pack_tiles, &job, items, 0))
        return -1;
    starts[0] = 0;
    for (long tile = 0; tile < tiles_of(&job); tile++) {
        total += starts[tile + 1];
        if (total > room)
            return PM_TOO_MANY_ESCAPES;
        starts[tile + 1] = (uint32_t)total;
    }
    return pm_pool_run(context->pool, list_all_escapes, &job, items, 0) ? -1 : total;
}

void pm_resident_row(const pm_resident *w, long K, long index, uint16_t *out)
{
    const long groups = pm_ceil_div(K, PM_GROUP_COLUMNS), tile = index / PM_TILE_ROWS;
    const long row = index % PM_TILE_ROWS;
    const uint8_t *group = w->tiles + tile * groups * PM_GROUP_BYTES;
    for (long k = 0; k < K; k += PM_GROUP_COLUMNS, group += PM_GROUP_BYTES) {
        const uint8_t *bytes = group + row * PM_GROUP_COLUMNS;
        const uint8_t *codes = group + PM_GROUP_CODES + row / 2 * PM_GROUP_COLUMNS;
        for (int c = 0; c < pm_min(PM_GROUP_COLUMNS, K - k); c++) {
            const int at = place_of(c), code = codes[at] >> row % 2 * 4 & 15;
            out[k + c] = (uint16_t)((bytes[at] & 0x80) << 8 | w->palette[code] << 7 |
                                    (bytes[at] & 0x7f));
        }
    }
    for (uint32_t i = w->starts[tile]; i < w->starts[tile + 1]; i++)
        if ((w->escapes[i] >> 14 & 3) == row) {
            uint16_t *at = out + (w->escapes[i] >> 16) * PM_GROUP_COLUMNS +
                           (w->escapes[i] >> 8 & 63);
            *at = (uint16_t)((*at & 0x807f) | (w->escapes[i] & 0xff) << 7);
        }
}

/* Rows ids[0..count) of a matrix, one after the other. */
PM_API void pm_resident_rows(const pm_resident *w, long K, const int64_t *ids, long count,
                             uint16_t *out)
{
    for (long i = 0; i < count; i++)
        pm_resident_row(w, K, ids[i], out + i * K);
}
