/* Row-wise operations for one element type: RMS norm, SiLU gate, rotary embedding + KV write. */

PM_TARGET static void FN(norm)(const void *argument, long item, void *scratch)
{
    const pm_norm_job *job = argument;
    const long H = job->H, end = pm_min(job->T, (item + 1) * job->unit);
    const E *weight = job->weight;
    (void)scratch;
    for (long t = item * job->unit; t < end; t++) {
        const E *x = (const E *)job->x + t * H;
        E *out = (E *)job->out + t * H;
        vf squares = vf_zero();
        if (job->residual != NULL) { /* normalise the rounded sum: it is what later layers see */
            const E *residual = (const E *)job->residual + t * H;
            E *sum = (E *)job->new_residual + t * H;
            for (long i = 0; i < H; i += VW) {
                long n = pm_min(VW, H - i);
                e_store_n(sum + i, vf_add(e_load_n(x + i, n), e_load_n(residual + i, n)), n);
            }
            x = sum;
        }
        for (long i = 0; i < H; i += VW) {
            vf v = e_load_n(x + i, pm_min(VW, H - i));
            squares = vf_fma(v, v, squares);
        }
        vf scale = vf_set1(1.0f / sqrtf(vf_sum(squares) / (float)H + job->eps));
        for (long i = 0; i < H; i += VW) {
            long n = pm_min(VW, H - i);
            vf v = vf_mul(e_load_n(x + i, n), scale);
            e_store_n(out + i, vf_mul(v, e_load_n(weight + i, n)), n);
        }
    }
}

PM_TARGET static void FN(silu_mul)(const void *argument, long item, void *scratch)
{
    const pm_silu_job *job = argument;
    const long I = job->I, end = pm_min(job->T, (item + 1) * job->unit);
    (void)scratch;
    for (long t = item * job->unit; t < end; t++) {
        const E *gate = (const E *)job->gate_up + 2 * t * I, *up = gate + I;
        E *out = (E *)job->out + t * I;
        for (long i = 0; i < I; i += VW) {
            long n = pm_min(VW, I - i);
            e_store_n(out + i, vf_mul(vf_silu(e_load_n(gate + i, n)), e_load_n(up + i, n)), n);
        }
    }
}

/* Rotates heads of D in place: (a, b) of the two halves -> (a cos - b sin, b cos + a sin). */
PM_INLINE void FN(rotate)(E *x, const float *cos_sin, long heads, long D)
{
    const long half = D / 2;
    for (long h = 0; h < heads; h++, x += D)
        for (long i = 0; i < half; i += VW) {
            long n = pm_min(VW, half - i);
            vf c = vf_load_n(cos_sin + i, n), s = vf_load_n(cos_sin + half + i, n);
            vf a = e_load_n(x + i, n), b = e_load_n(x + half + i, n);
            e_store_n(x + i, vf_sub(vf_mul(a, c), vf_mul(b, s)), n);
            e_store_n(x + half + i, vf_fma(a, s, vf_mul(b, c)), n);
        }
}

PM_TARGET static void FN(rope)(const void *argument, long item, void *scratch)
{
    const pm_rope_job *job = argument;
    const long D = job->D, end = pm_min(job->T, (item + 1) * job->unit);
    const size_t token_bytes = (size_t)(job->Hk * D) * sizeof(E);
    (void)scratch;
    for (long t = item * job->unit; t < end; t++) {
        const float *cos_sin = job->cos_sin + job->positions[t] * D;
        E *k = (E *)job->k + t * job->k_stride;
        FN(rotate)((E *)job->q + t * job->q_stride, cos_sin, job->Hq, D);
        FN(rotate)(k, cos_sin, job->Hk, D);
        memcpy((E *)job->k_cache + job->slots[t] * job->Hk * D, k, token_bytes);
        memcpy((E *)job->v_cache + job->slots[t] * job->Hk * D,
               (const E *)job->v + t * job->v_stride, token_bytes);
    }
}
