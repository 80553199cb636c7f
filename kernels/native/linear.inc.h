/* y = x w^T + bias for one element type.
 *
 * Few rows (decode) are bound by reading w once: DOT_T rows of x against 4 rows of w, vectors along
 * K. Many rows (prefill) are bound by arithmetic: a panel of w is packed once per item and
 * multiplied tile by tile. In both, the order of summation of an output does not depend on T.
 *
 * Roofline, bf16 on one Zen 5 core with the shapes of a 135M model: one row reads w at 17 GB/s of a
 * measured 21; 512 rows run at 217 billion multiply-adds/s (oneDNN in torch 2.13: 220).
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

/* out[t][r] = x[t] . w[r]; tt is a constant wherever this is called. */
PM_INLINE void FN(dot_tile)(const E *x, const E *const w[4], long K, float out[DOT_T][4],
                            const int tt)
{
    vf acc[DOT_T][4];
    long k = 0;
    for (int t = 0; t < tt; t++)
        for (int r = 0; r < 4; r++)
            acc[t][r] = vf_zero();
    for (; k + DW <= K; k += DW) {
        dv row[4];
        for (int r = 0; r < 4; r++)
            row[r] = d_load(w[r] + k);
        for (int t = 0; t < tt; t++) {
            dv xv = d_load(x + t * K + k);
            for (int r = 0; r < 4; r++)
                acc[t][r] = d_dot(acc[t][r], xv, row[r]);
        }
    }
    if (k < K)
        for (int t = 0; t < tt; t++) {
            dv xv = d_load_n(x + t * K + k, K - k);
            for (int r = 0; r < 4; r++)
                acc[t][r] = d_dot(acc[t][r], xv, d_load_n(w[r] + k, K - k));
        }
    for (int t = 0; t < tt; t++)
        vf_sum4(out[t], acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
}

PM_TARGET static void FN(linear_dot)(const void *argument, long item, void *scratch)
{
    const pm_linear_job *job = argument;
    const E *x = job->x, *w = job->w;
    const long K = job->K, end = pm_min(job->N, (item + 1) * job->unit);
    (void)scratch;
    for (long n = item * job->unit; n < end; n += 4) {
        const E *rows[4];
        const long columns = pm_min(4, end - n);
        for (int r = 0; r < 4; r++)
            rows[r] = w + pm_min(n + r, end - 1) * K;
        for (long t = 0; t < job->T; t += DOT_T) {
            float sums[DOT_T][4];
            const long count = pm_min(DOT_T, job->T - t);
            switch (count) {
            case 1: FN(dot_tile)(x + t * K, rows, K, sums, 1); break;
            case 2: FN(dot_tile)(x + t * K, rows, K, sums, 2); break;
#if PM_DOT_T > 2
            case 3: FN(dot_tile)(x + t * K, rows, K, sums, 3); break;
            case 4: FN(dot_tile)(x + t * K, rows, K, sums, 4); break;
#endif
            }
            for (long i = 0; i < count; i++)
                FN(put_columns)(job, t + i, n, sums[i], columns);
        }
    }
}

/* Scratch: B [K' / STEP][GEMM_NP], A [GEMM_MR][K'], C [GEMM_MR][GEMM_NP]; K' = K up to a STEP. */
static size_t FN(linear_gemm_scratch)(const pm_linear_job *job)
{
    size_t padded = (size_t)(pm_ceil_div(job->K, STEP) * STEP);
    return pm_round64(padded / STEP * GEMM_NP * 4) + pm_round64(GEMM_MR * padded * sizeof(A)) +
           GEMM_MR * GEMM_NP * sizeof(float);
}

PM_TARGET static void FN(linear_gemm)(const void *argument, long item, void *scratch)
{
    const pm_linear_job *job = argument;
    const long K = job->K, steps = pm_ceil_div(K, STEP), padded = steps * STEP;
    const long n0 = item / job->units * GEMM_NP, columns = pm_min(GEMM_NP, job->N - n0);
    const long t0 = item % job->units * job->unit, t1 = pm_min(job->T, t0 + job->unit);
    const int copies = sizeof(A) != sizeof(E) || padded != K;
    uint32_t *b = scratch;
    A *a = (A *)((char *)b + pm_round64((size_t)(steps * GEMM_NP * 4)));
    float *c = (float *)((char *)a + pm_round64((size_t)(GEMM_MR * padded) * sizeof(A)));
    const E *rows[GEMM_NP];
    for (long i = 0; i < GEMM_NP; i++)
        rows[i] = (const E *)job->w + (n0 + pm_min(i, columns - 1)) * K;
    FN(pack_rows)(rows, K, b);
    for (long t = t0; t < t1; t += GEMM_MR) {
        const E *x = (const E *)job->x + t * K;
        const long m = pm_min(GEMM_MR, t1 - t);
        if (copies)
            for (long i = 0; i < m; i++)
                FN(copy_row)(a + i * padded, x + i * K, K, padded);
        FN(gemm_tile)(copies ? a : (const A *)x, padded, b, steps, c, GEMM_NP, 0, m);
        for (long i = 0; i < m; i++)
            FN(put_columns)(job, t + i, n0, c + i * GEMM_NP, columns);
    }
}
