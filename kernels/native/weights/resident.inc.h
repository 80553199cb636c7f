/* Products with weights in the resident form (resident.h), with the bits of linear.inc.h: the same
 * values in the same order, so one code serves both and tests hold them equal.
 *
 * Two ways. Fused, where that has been written and for few rows of x: a group is decoded in registers
 * on its way to the multiplier, once per tile of x. Through scratch: a panel of rows of w is decoded into
 * the first cache and all rows of x of a block pass it, a tile after the other; meanwhile they fetch what
 * comes next, evenly, since bursts of it hold up the loads of a product.
 *
 * Which way is a matter of the rows of x alone (plan_resident in phases.c): fused up to one tile, since
 * a second one would decode again.
 *
 * Roofline: 1 row of x reads 1.5 bytes a weight for 2; a group costs 32 operations on vectors beside 8
 * products a row of x, less than its 384 bytes take from memory, and 16 cycles where it is decoded to
 * scratch, beside 4 a row of x. Measured on Zen 5, a 135M model, one core, against 16 bits in the
 * same minute (benchmarks/resident.py): 1 row 1.3 times as fast, 8 rows 1.17, 16 rows 1.03, 32 rows 1.07,
 * 128 and 512 rows 1.0. Decoded rows kept in the second cache for all blocks of x, as 16-bit weights
 * are: 0.92 with 128 rows; fetched there ahead: no better.
 */

/* 4 rows of group g to `out`, ld apart, with their escapes; *next is the tile's next escape. */
PM_INLINE void unpack_group(rt tables, const uint8_t *group, long g, const uint32_t **next,
                            const uint32_t *end, uint16_t *out, long ld)
{
    for (int r = 0; r < PM_TILE_ROWS; r++)
        rt_unpack(tables, group, r, out + r * ld);
    for (; *next < end && **next >> 16 == (uint32_t)g; ++*next)
        pm_put_escape(**next, out, ld);
}

/* Columns [k, k + n) of a tile to 4 rows of `out`, ld apart; k is a multiple of 64, and rows have
 * room for n rounded up to one. */
PM_TARGET static void unpack_tile(const pm_resident *w, long K, long tile, long k, long n, W *out,
                                  long ld)
{
    const rt tables = rt_open(w->palette);
    const long groups = pm_ceil_div(K, PM_GROUP_COLUMNS);
    const uint8_t *group = w->tiles + (tile * groups + k / PM_GROUP_COLUMNS) * PM_GROUP_BYTES;
    const uint32_t *next = w->escapes + w->starts[tile], *end = w->escapes + w->starts[tile + 1];
    while (next < end && *next >> 16 < (uint32_t)(k / PM_GROUP_COLUMNS))
        next++;
    for (long at = 0; at < n; at += PM_GROUP_COLUMNS, group += PM_GROUP_BYTES) {
        const long g = (k + at) / PM_GROUP_COLUMNS;
#if PM_PLAIN_C
        uint16_t rows[PM_TILE_ROWS * PM_GROUP_COLUMNS];
        unpack_group(tables, group, g, &next, end, rows, PM_GROUP_COLUMNS);
        for (int r = 0; r < PM_TILE_ROWS; r++)
            FN(copy_row)(out + r * ld + at, rows + r * PM_GROUP_COLUMNS, PM_GROUP_COLUMNS,
                         PM_GROUP_COLUMNS);
#else
        unpack_group(tables, group, g, &next, end, out + at, ld);
#endif
    }
}

/* Tiles of w from one that is decoded to the one that is fetched: as long as its way from memory takes
 * (measured on Zen 5: 8 rows 5 % slower with 2, 32 rows 2 % slower with 3). */
PM_INLINE long tiles_ahead(const pm_linear_job *job, long tiles)
{
    return pm_max(job->panel / PM_TILE_ROWS, tiles == 2 ? 3 : 2);
}

/* What tile `tile` of x, of `tiles`, fetches of the weights to come while it passes the 4 rows from n on,
 * and in *lines how much, see dot. All is fetched by the last three tiles: it is to be in the first cache
 * still when it is decoded. Beyond the matrix nothing is read, and a fetch of that does no harm. */
PM_INLINE const char *stream_of(const pm_linear_job *job, long n, long k, long n_k, long tile,
                                long tiles, long *lines)
{
    const long groups = pm_ceil_div(job->K, PM_GROUP_COLUMNS);
    const long next = n / PM_TILE_ROWS + tiles_ahead(job, tiles);
    const long group = next * groups + k / PM_GROUP_COLUMNS;
    const long done = tiles == 2 ? 2 * tile : pm_max(0, 3 - tiles + tile); /* lines, by tiles before */
    *lines = tiles == 1 ? 3 : tiles == 2 ? 2 - tile : tile + 3 >= tiles;
    return (const char *)job->w.resident->tiles + group * PM_GROUP_BYTES + 2 * done * n_k;
}

#if PM_FUSED
/* Vector j of a row of a group, in the order of its columns. */
PM_INLINE dv rt_part(const __m512i row[2], int j)
{
#if PAIRS
    return row[j];
#else
    return widen_bf16(j % 2 ? _mm512_extracti64x4_epi64(row[j / 2], 1)
                            : _mm512_castsi512_si256(row[j / 2]));
#endif
}

/* acc[t][r] += x[t] . row r over the n <= 64 columns of a group that was decoded to memory. */
PM_INLINE void multiply_unpacked(vf acc[DOT_T][4], const A *x, long ldx, const uint16_t *rows,
                                 long n, const int tt)
{
    long k = 0;
    for (; k + DW <= n; k += DW)
        for (int t = 0; t < tt; t++) {
            const dv xv = d_load(x + t * ldx + k);
            for (int r = 0; r < 4; r++)
                acc[t][r] = d_dot(acc[t][r], xv, dw_load(rows + r * PM_GROUP_COLUMNS + k));
        }
    if (k < n)
        for (int t = 0; t < tt; t++) {
            const dv xv = d_load_n(x + t * ldx + k, n - k);
            for (int r = 0; r < 4; r++)
                acc[t][r] =
                    d_dot(acc[t][r], xv, dw_load_n(rows + r * PM_GROUP_COLUMNS + k, n - k));
        }
}

/* sums[t][r] = x[t] . w[r] for one tile of w; tt is a constant wherever this is called. */
PM_INLINE void fused_tile(const pm_resident *w, long K, long tile, const A *x, float *sums,
                          long ld_sums, const int tt)
{
    const rt tables = rt_open(w->palette);
    const long groups = pm_ceil_div(K, PM_GROUP_COLUMNS), tile_bytes = groups * PM_GROUP_BYTES;
    const uint8_t *group = w->tiles + tile * tile_bytes;
    const uint32_t *next = w->escapes + w->starts[tile], *end = w->escapes + w->starts[tile + 1];
    vf acc[DOT_T][4];
    for (int t = 0; t < tt; t++)
        for (int r = 0; r < 4; r++)
            acc[t][r] = vf_zero();
    for (long g = 0; g < groups; g++, group += PM_GROUP_BYTES) {
        const long k = g * PM_GROUP_COLUMNS, n = K - k;
        for (int line = 0; line < PM_GROUP_BYTES; line += 64)
            __builtin_prefetch(group + AHEAD_BYTES + line);
        if (n < PM_GROUP_COLUMNS || (next < end && *next >> 16 == (uint32_t)g)) {
            uint16_t rows[PM_TILE_ROWS * PM_GROUP_COLUMNS];
            unpack_group(tables, group, g, &next, end, rows, PM_GROUP_COLUMNS);
            multiply_unpacked(acc, x + k, K, rows, pm_min(n, PM_GROUP_COLUMNS), tt);
            continue;
        }
        for (int r = 0; r < 4; r++) {
            __m512i row[2];
            rt_row(tables, group, r, row);
            for (int j = 0; j < PM_GROUP_COLUMNS / DW; j++) {
                const dv part = rt_part(row, j);
                for (int t = 0; t < tt; t++)
                    acc[t][r] = d_dot(acc[t][r], d_load(x + t * K + k + j * DW), part);
            }
        }
    }
    for (int t = 0; t < tt; t++)
        vf_sum4(sums + t * ld_sums, acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
}

PM_INLINE void fused_rows(const pm_linear_job *job, long tile, const A *x, float *sums, long rows)
{
    const pm_resident *w = job->w.resident;
    const long K = job->K, ld = job->columns;
    switch (rows) {
    case 1: fused_tile(w, K, tile, x, sums, ld, 1); break;
    case 2: fused_tile(w, K, tile, x, sums, ld, 2); break;
    case 3: fused_tile(w, K, tile, x, sums, ld, 3); break;
    case 4: fused_tile(w, K, tile, x, sums, ld, 4); break;
    case 5: fused_tile(w, K, tile, x, sums, ld, 5); break;
    case 6: fused_tile(w, K, tile, x, sums, ld, 6); break;
    }
}

/* All rows of x times columns [n0, end) to sums, rows `columns` apart. */
PM_INLINE void multiply_fused(const pm_linear_job *job, const A *x, long n0, long end, float *sums)
{
    for (long n = n0; n < end; n += PM_TILE_ROWS)
        for (long t = 0; t < job->T; t += DOT_T)
            fused_rows(job, n / PM_TILE_ROWS, x + t * job->K, sums + t * job->columns + n - n0,
                       pm_min(DOT_T, job->T - t));
}
#endif
