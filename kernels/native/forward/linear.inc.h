/* y = x w^T + bias for one element type, by one scheme whatever the number of rows.
 *
 * Order of summation, a function of K alone: lane j of an accumulator takes k = j, j + DW, ... (pairs
 * of k where the processor multiplies pairs), then vf_sum4 adds the lanes. Tiles, blocks and items
 * only choose which outputs are worked on together, so a row's result depends neither on the other
 * rows nor on the threads.
 *
 * A tile is DOT_T rows of x against 4 rows of w, vectors along K; one row of x takes the rows of w one
 * after the other, a single stream of memory. While the first rows of an item pass, w is prefetched:
 * it is read from memory once, and comes too late otherwise. Where one block holds all rows, it is
 * used once as well, so it is fetched without a place in the caches behind the first: a pass of a 135M
 * model takes 2 % less for one row on two cores, 4 % on one, where parts of the weights are still in
 * the last cache from the pass before, and 4 % for 16 rows on two; who computes between two passes
 * finds more of its own in the caches (Python of an engine, 4 rows: 140 us instead of 190). Many
 * rows: x in blocks that stay in the first cache, K in blocks between which accumulators wait in
 * scratch.
 *
 * Roofline, bf16 on one Zen 5 core with the shapes of a 135M model: 1 row reads w at 39 GB/s where a
 * bare stream of products has 41 (same minute; 4 rows of w side by side: 32, prefetched 2 KiB ahead 34,
 * 12 KiB 38, 16 KiB 36); 512 rows run at 213 billion multiply-adds/s, 420 on two cores (oneDNN in
 * torch 2.13: 220 on one).
 */

/* Stores n results of row t from column n0 on, with bias, in the output type of the job. */
PM_INLINE void FN(put_columns)(const pm_linear_job *job, long t, long n0, const float *sums, long n)
{
    long at = t * job->N + n0, i = 0;
    for (; i < n; i += VW) {
        long lanes = pm_min(VW, n - i);
        vf v = vf_load_n(sums + i, lanes);
        if (job->bias != NULL)
            v = vf_add(v, e_load_n((const E *)job->bias + n0 + i, lanes));
        if (job->y_f32)
            vf_store_n((float *)job->y + at + i, v, lanes);
        else
            e_store_n((E *)job->y + at + i, v, lanes);
    }
}

/* One block of K of a tile. */
typedef struct {
    const A *x; /* rows lie ldx elements apart */
    const W *w[4];
    long ldx, K;
    long ahead; /* bytes from w to what is prefetched while it passes; 0: nothing */
    int once;   /* no other block of x comes: w needs no place in the caches behind the first */
    const char *stream; /* resident weights to come, fetched while it passes: */
    long lines;         /* so many of 64 bytes for every 32 columns, up to 3 */
    float *partial;    /* [DOT_T][4][VW]: accumulators between blocks of K */
    int first, last;   /* block of K */
    float *sums;       /* rows of 4, ld_sums apart; written by the last block */
    long ld_sums;
} FN(dot);

/* Fetches what is due of a stream at column k. */
PM_INLINE void FN(fetch)(const char *stream, long lines, long k)
{
    stream += 2 * lines * k;
    __builtin_prefetch(stream);
    if (lines > 1)
        __builtin_prefetch(stream + 64);
    if (lines > 2)
        __builtin_prefetch(stream + 128);
}

/* sums[t][r] (+)= x[t] . w[r]; tt, and whether it `fetches` of a stream, are constants wherever this is
 * called: AVX2 has no register left to look it up. */
PM_INLINE void FN(dot_tile)(const FN(dot) * b, const int tt, const int fetches)
{
    const A *const x = b->x;
    const W *const *const w = b->w;
    const long K = b->K, ldx = b->ldx, ahead = b->ahead, lines = b->lines;
    const char *const stream = b->stream;
    vf acc[DOT_T][4];
    long k = 0;
    for (int t = 0; t < tt; t++)
        for (int r = 0; r < 4; r++)
            acc[t][r] = b->first ? vf_zero() : vf_load(b->partial + (t * 4 + r) * VW);
    if (tt == 1) {
        for (int r = 0; r < 4; r++)
            for (k = 0; k + DW <= K; k += DW) {
                acc[0][r] = d_dot(acc[0][r], d_load(x + k), dw_load(w[r] + k));
                if (ahead != 0)
                    __builtin_prefetch((const char *)(w[r] + k) + ahead, 0, 0);
                if (fetches && r == 0)
                    FN(fetch)(stream, lines, k);
            }
    }
    for (; k + DW <= K; k += DW) {
        dv row[4];
        for (int r = 0; r < 4; r++) {
            row[r] = dw_load(w[r] + k);
            if (ahead != 0 && b->once)
                __builtin_prefetch((const char *)(w[r] + k) + ahead, 0, 0);
            else if (ahead != 0)
                __builtin_prefetch((const char *)(w[r] + k) + ahead);
        }
        if (fetches)
            FN(fetch)(stream, lines, k);
        for (int t = 0; t < tt; t++) {
            dv xv = d_load(x + t * ldx + k);
            for (int r = 0; r < 4; r++)
                acc[t][r] = d_dot(acc[t][r], xv, row[r]);
        }
    }
    if (k < K)
        for (int t = 0; t < tt; t++) {
            dv xv = d_load_n(x + t * ldx + k, K - k);
            for (int r = 0; r < 4; r++)
                acc[t][r] = d_dot(acc[t][r], xv, dw_load_n(w[r] + k, K - k));
        }
    for (int t = 0; t < tt; t++) {
        if (b->last)
            vf_sum4(b->sums + t * b->ld_sums, acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
        else
            for (int r = 0; r < 4; r++)
                vf_store(b->partial + (t * 4 + r) * VW, acc[t][r]);
    }
}

PM_INLINE void FN(dot_rows)(const FN(dot) * b, long rows, const int fetches)
{
    switch (rows) {
    case 1: FN(dot_tile)(b, 1, fetches); break;
    case 2: FN(dot_tile)(b, 2, fetches); break;
#if PM_DOT_T > 2
    case 3: FN(dot_tile)(b, 3, fetches); break;
#endif
#if PM_DOT_T > 3
    case 4: FN(dot_tile)(b, 4, fetches); break;
    case 5: FN(dot_tile)(b, 5, fetches); break;
    case 6: FN(dot_tile)(b, 6, fetches); break;
#endif
    }
}

/* Scratch of an item, for blocks of job->rows rows, job->columns columns and job->depth of K. */
typedef struct {
    float *sums;    /* [rows][columns] */
    float *partial; /* [columns / 4][rows up to DOT_T][4][VW] */
    A *x;           /* [rows][K], where A is not E */
    W *w;           /* [panel][depth], where weights are decoded */
    size_t bytes;
} FN(linear_room);

/* Are weights multiplied from scratch, in another form than they are kept in? */
static int FN(decodes)(const pm_linear_job *job)
{
    return job->w.rows == NULL ? !job->fused : sizeof(W) != sizeof(E);
}

/* Distance of rows of decoded weights. */
static long FN(room_stride)(const pm_linear_job *job)
{
    return pm_ceil_div(job->depth, PM_GROUP_COLUMNS) * PM_GROUP_COLUMNS;
}

static FN(linear_room) FN(lay_out_linear)(const pm_linear_job *job, char *memory)
{
    const size_t tiles = (size_t)(job->columns / 4 * pm_ceil_div(job->rows, DOT_T));
    FN(linear_room) room;
    size_t at = 0;
#define PLACE(field, count)           \
    room.field = (void *)(memory + at); \
    at += pm_round64((size_t)(count) * sizeof *room.field)
    PLACE(sums, job->rows * job->columns);
    PLACE(partial, job->depth < job->K ? tiles * DOT_T * 4 * VW : 0);
    PLACE(x, sizeof(A) != sizeof(E) ? job->rows * job->K : 0);
    PLACE(w, FN(decodes)(job) ? job->panel * FN(room_stride)(job) : 0);
#undef PLACE
    room.bytes = at;
    return room;
}

static size_t FN(linear_scratch)(const pm_linear_job *job)
{
    static char nothing[1];
    return FN(lay_out_linear)(job, nothing).bytes;
}

#if PM_BF16
/* Columns [k, k + n_k) of rows [n, end) of w to `out`, as they are multiplied. */
PM_INLINE void decode_panel(const pm_linear_job *job, long n, long end, long k, long n_k, W *out)
{
    const long ld = FN(room_stride)(job);
    if (job->w.rows == NULL)
        for (long at = n; at < end; at += PM_TILE_ROWS)
            unpack_tile(job->w.resident, job->K, at / PM_TILE_ROWS, k, n_k, out + (at - n) * ld, ld);
#if PM_PLAIN_C
    else
        for (long at = n; at < end; at++)
            FN(copy_row)(out + (at - n) * ld, (const E *)job->w.rows + at * job->K + k, n_k, n_k);
#endif
}
#endif

/* Rows [t, t + rows) times columns [n0, end): sums to room.sums. Whether w is `resident` is a constant
 * wherever this is called. */
PM_INLINE void FN(multiply_block)(const pm_linear_job *job, const FN(linear_room) * room,
                                  const A *x, long rows, long n0, long end, int prefetch,
                                  const int resident)
{
    const long K = job->K, tiles = pm_ceil_div(rows, DOT_T), ld = FN(room_stride)(job);
    const int decodes = resident || sizeof(W) != sizeof(E);
    FN(dot) b = {.ldx = K, .once = rows == job->T, .ld_sums = job->columns};
    /* One stream of rows, or the same place of the next 4. */
    const long ahead = !prefetch || decodes ? 0 : rows == 1 ? AHEAD_BYTES : 4 * K * (long)sizeof(W);
    for (long k = 0; k == 0 || k < K; k += job->depth) {
        b.K = pm_min(job->depth, K - k);
        b.first = k == 0;
        b.last = k + b.K == K;
        for (long panel = n0; panel < end; panel += job->panel) {
            const long stop = pm_min(end, panel + job->panel);
#if PM_BF16
            if (decodes)
                decode_panel(job, panel, stop, k, b.K, room->w);
#endif
            for (long tile = 0; tile < tiles; tile++)
                for (long n = panel; n < stop; n += 4) {
                    for (long r = 0; r < 4; r++) {
                        const long row = pm_min(n + r, stop - 1);
                        b.w[r] = decodes ? room->w + (row - panel) * ld
                                         : (const W *)job->w.rows + row * K + k;
                    }
#if PM_BF16
                    if (resident)
                        b.stream = stream_of(job, n, k, b.K, tile, tiles, &b.lines);
#endif
                    b.ahead = tile == 0 ? ahead : 0;
                    b.x = x + tile * DOT_T * K + k;
                    b.sums = room->sums + tile * DOT_T * job->columns + n - n0;
                    b.partial = room->partial + ((n - n0) / 4 * tiles + tile) * (DOT_T * 4 * VW);
                    const long in_tile = pm_min(DOT_T, rows - tile * DOT_T);
                    if (resident && b.lines != 0)
                        FN(dot_rows)(&b, in_tile, 1);
                    else
                        FN(dot_rows)(&b, in_tile, 0);
                }
        }
    }
}

PM_TARGET static void FN(linear)(const void *argument, long item, void *scratch)
{
    const pm_linear_job *job = argument;
    const FN(linear_room) room = FN(lay_out_linear)(job, scratch);
    const long K = job->K, n0 = item / job->row_items * job->columns;
    const long end = pm_min(job->N, n0 + job->columns);
    const long t0 = item % job->row_items * job->item_rows, t1 = pm_min(job->T, t0 + job->item_rows);
    for (long t = t0; t < t1; t += job->rows) {
        const long rows = pm_min(job->rows, t1 - t);
        const E *x = (const E *)job->x + t * K;
        if (sizeof(A) != sizeof(E))
            for (long i = 0; i < rows; i++)
                FN(copy_row)(room.x + i * K, x + i * K, K, K);
        const A *block = sizeof(A) != sizeof(E) ? room.x : (const A *)x;
#if PM_BF16 && PM_FUSED
        if (job->fused)
            multiply_fused(job, block, n0, end, room.sums);
        else
#endif
#if PM_BF16
        if (job->w.rows == NULL)
            FN(multiply_block)(job, &room, block, rows, n0, end, t == t0, 1);
        else
#endif
        FN(multiply_block)(job, &room, block, rows, n0, end, t == t0, 0);
        for (long i = 0; i < rows; i++)
            FN(put_columns)(job, t + i, n0, room.sums + i * job->columns, end - n0);
    }
}
