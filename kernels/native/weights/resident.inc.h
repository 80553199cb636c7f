/* Products with weights in the resident form (resident.h), with the bits of linear.inc.h: the same
 * values in the same order, so one code serves both and tests hold them equal.
 *
 * Two ways. Fused, where that has been written and for few rows of x: a group is decoded in registers
 * on its way to the multiplier, once per tile of x. Through scratch: 4 rows of w are decoded once,
 * for the first block of x, and stay in cache for the others.
 *
 * Which way is a matter of the rows of x alone (plan_resident in phases.c): fused up to one tile, since
 * a second one would decode again (8 rows: 5 % slower than 16-bit weights where scratch is 5 % faster).
 *
 * Roofline: 1 row of x reads 1.5 bytes a weight for 2; a group costs 32 operations on vectors beside 8
 * products a row of x, less than its 384 bytes take from memory. Measured on Zen 5, a 135M model, against
 * 16 bits in the same minute (benchmarks/resident.py): 1 row 1.28 times as fast (36 GB/s on one core), 4
 * rows 1.53; 16 rows 0.93 on one core, 1.08 on two, where memory is scarcer; prefill 0.92 to 0.99.
 */

static long resident_tile_bytes(long K)
{
    return pm_ceil_div(K, PM_GROUP_COLUMNS) * PM_GROUP_BYTES;
}

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
 * room for n rounded up to one. What lies `ahead` bytes on is fetched meanwhile; 0: nothing. */
PM_TARGET static void unpack_tile(const pm_resident *w, long K, long tile, long k, long n, W *out,
                                  long ld, long ahead)
{
    const rt tables = rt_open(w->palette);
    const long groups = pm_ceil_div(K, PM_GROUP_COLUMNS);
    const uint8_t *group = w->tiles + (tile * groups + k / PM_GROUP_COLUMNS) * PM_GROUP_BYTES;
    const uint32_t *next = w->escapes + w->starts[tile], *end = w->escapes + w->starts[tile + 1];
    while (next < end && *next >> 16 < (uint32_t)(k / PM_GROUP_COLUMNS))
        next++;
    for (long at = 0; at < n; at += PM_GROUP_COLUMNS, group += PM_GROUP_BYTES) {
        const long g = (k + at) / PM_GROUP_COLUMNS;
        for (int line = 0; ahead != 0 && line < PM_GROUP_BYTES; line += 64)
            __builtin_prefetch(group + ahead + line);
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

/* Is what follows fetched while products are computed, and not while this tile is decoded? With so
 * many tiles of x that is better (measured on Zen 5: 16 rows, 3 tiles, 4 % slower; 32 rows, 6 tiles, 8 %
 * faster), and always where decoded rows go to the second cache (128 rows: 7 %). */
enum { PM_TILES_TO_FETCH_IN = 4 };

PM_INLINE int fetches_in_products(const pm_linear_job *job, long tiles)
{
    return tiles >= PM_TILES_TO_FETCH_IN || job->rows < job->T;
}

/* Lines of the tile that follows, from column k on: a part of them before each tile of x, since all
 * at once would wait for each other. */
typedef struct {
    const uint8_t *next;
    long lines;
} resident_ahead;

PM_INLINE resident_ahead look_ahead(const pm_resident *w, long K, long n, long k, long n_k, long parts)
{
    const long groups = pm_ceil_div(K, PM_GROUP_COLUMNS);
    const long group = (n / PM_TILE_ROWS + 1) * groups + k / PM_GROUP_COLUMNS;
    const long lines = pm_ceil_div(n_k, PM_GROUP_COLUMNS) * (PM_GROUP_BYTES / 64);
    return (resident_ahead){w->tiles + group * PM_GROUP_BYTES, pm_ceil_div(lines, parts)};
}

PM_INLINE void fetch_ahead(resident_ahead *ahead)
{
    for (long line = 0; line < ahead->lines; line++, ahead->next += 64)
        __builtin_prefetch(ahead->next);
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
