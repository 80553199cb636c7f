/* Gumbel-max sampling of one row of logits. kernels/reference/sampling.py defines every term; the
 * nucleus is found without sorting: the best token overall is the answer if it lies inside, and
 * otherwise it and all that rank behind it are out, so the search repeats among those before it.
 * Top-k and min-p are limits of z: what is below has no score, and all before a token that is above
 * are above as well. */

enum { PHILOX_ROUNDS = 10, LANES_PER_COUNTER = 4 };

/* 4 VW random words for tokens [4 counter, 4 (counter + VW)), in token order. */
PM_INLINE void philox_words(uint32_t counter, uint32_t index, uint32_t choice, uint64_t seed,
                            uint32_t words[LANES_PER_COUNTER * VW])
{
    uint64_t c0[VW], c1[VW], c2[VW], c3[VW]; /* of 32 bits each: so they are multiplied as they lie */
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < VW; i++) {
        c0[i] = (uint32_t)(counter + (uint32_t)i);
        c1[i] = index;
        c2[i] = choice;
        c3[i] = 0;
    }
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        for (int i = 0; i < VW; i++) {
            const uint64_t p0 = 0xD2511F53u * (c0[i] & 0xffffffffu);
            const uint64_t p1 = 0xCD9E8D57u * (c2[i] & 0xffffffffu);
            c0[i] = (p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = p1 & 0xffffffffu;
            c2[i] = (p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = p0 & 0xffffffffu;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < VW; i++) {
        words[4 * i] = (uint32_t)c0[i];
        words[4 * i + 1] = (uint32_t)c1[i];
        words[4 * i + 2] = (uint32_t)c2[i];
        words[4 * i + 3] = (uint32_t)c3[i];
    }
}

/* v = (word + 0.5) 2^-32, v < 1 in float32. */
PM_INLINE vf uniform(const uint32_t *words)
{
    float halves[VW];
    for (int i = 0; i < VW; i++) /* two exact halves, one rounding: like uint32 -> float32 */
        halves[i] = (float)(words[i] >> 16) * 65536.0f + (float)(words[i] & 0xffff);
    vf v = vf_mul(vf_add(vf_load(halves), vf_set1(0.5f)), vf_set1(0x1p-32f));
    return vf_min(v, vf_set1(1.0f - 0x1p-24f));
}

/* -log(-log1p(-v)) of the words' v. */
PM_INLINE vf gumbel(const uint32_t *words)
{
    const vf v = uniform(words);
    /* log1p(-v) = log(u) v / (1 - u) where u = 1 - v after rounding; -v where u is 1. */
    vf u = vf_sub(vf_set1(1.0f), v);
    vf rounded = vf_sub(vf_set1(1.0f), u);
    vf ratio = vf_div(v, vf_max(rounded, vf_set1(0x1p-60f)));
    vf exponential = vf_mul(vf_sub(vf_zero(), vf_log(u)), ratio);
    exponential = vf_max(exponential, v); /* -log1p(-v) >= v; also the value where u is 1 */
    return vf_sub(vf_zero(), vf_log(exponential));
}

/* Ranks before (z, id): a greater z, or the same z and a smaller id. */
PM_INLINE int ranks_before(float z, long id, float limit_z, long limit_id)
{
    return z > limit_z || (z == limit_z && id < limit_id);
}

PM_TARGET static long highest(const float *x, long n)
{
    vf best = vf_set1(-INFINITY);
    long i = 0;
    for (; i + VW <= n; i += VW)
        best = vf_max(vf_load(x + i), best);
    float peak = vf_hmax(best);
    for (; i < n; i++)
        peak = x[i] > peak ? x[i] : peak;
    if (!(peak > -INFINITY && peak < INFINITY))
        return -1;
    for (i = 0; x[i] != peak; i++) {
    }
    return i;
}

PM_TARGET static int has_nan(const float *x, long n)
{
    int found = 0;
    for (long i = 0; i < n; i++)
        found |= x[i] != x[i];
    return found;
}

/* The k-th largest of x, by a heap of the k largest so far whose root is the smallest. */
PM_TARGET static float kth_largest(const float *x, long n, long k, float *heap)
{
    for (long i = 0; i < n; i++) {
        long at;
        if (i < k) {
            for (at = i; at > 0 && heap[(at - 1) / 2] > x[i]; at = (at - 1) / 2)
                heap[at] = heap[(at - 1) / 2];
        } else {
            if (!(x[i] > heap[0]))
                continue;
            long child;
            for (at = 0; (child = 2 * at + 1) < k; at = child) {
                if (child + 1 < k && heap[child + 1] < heap[child])
                    child++;
                if (heap[child] >= x[i])
                    break;
                heap[at] = heap[child];
            }
        }
        heap[at] = x[i];
    }
    return heap[0];
}

/* The highest score where every token may be drawn; `token` is that of the greatest logit. Noise is at
 * most -log v, so a score is at most z - log v, and who is to reach the highest so far needs
 * v <= e^(z - highest). A handful of tokens pass, and only their noise is computed; REACH is more than
 * all roundings together. */
PM_TARGET static long draw_from_all(const pm_sample_job *job, long row, long token)
{
    enum { BLOCK = LANES_PER_COUNTER * VW };
    const float log2e = 1.44269504f, REACH = 0x1p-10f;
    const float *logits = job->logits + row * job->V;
    const vf peak = vf_set1(logits[token]), divisor = vf_set1(job->temperature[row]);
    const uint32_t index = job->index[row], choice = job->choice[row];
    const uint64_t seed = job->seed[row];
    uint32_t words[BLOCK];
    float z[BLOCK], scores[VW];

    philox_words((uint32_t)(token / LANES_PER_COUNTER), index, choice, seed, words);
    vf_store(scores, gumbel(words));
    float highest_score = scores[token % LANES_PER_COUNTER]; /* z is 0 */
    for (long i = 0; i < job->V; i += BLOCK) {
        const vf level = vf_set1(REACH - highest_score * log2e);
        vf passed = vf_set1(-1.0f);
        philox_words((uint32_t)(i / LANES_PER_COUNTER), index, choice, seed, words);
        for (long j = 0; j < BLOCK && i + j < job->V; j += VW) {
            const vf logit = vf_load_n(logits + i + j, pm_min(VW, job->V - i - j));
            const vf zv = vf_div(vf_sub(logit, peak), divisor);
            const vf octaves = vf_min(vf_fma(zv, vf_set1(log2e), level), vf_set1(127.0f));
            vf_store(z + j, zv);
            passed = vf_max(passed, vf_sub(vf_exp2(octaves), uniform(words + j)));
        }
        if (vf_hmax(passed) < 0.0f)
            continue;
        for (long j = 0; j < pm_min(BLOCK, job->V - i); j++) {
            if (j % VW == 0)
                vf_store(scores, vf_add(vf_load(z + j), gumbel(words + j)));
            const float score = scores[j % VW];
            if (score > highest_score || (score == highest_score && i + j < token)) {
                highest_score = score;
                token = i + j;
            }
        }
    }
    return token;
}

PM_TARGET static void sample(const void *argument, long row, void *scratch)
{
    const pm_sample_job *job = argument;
    const long V = job->V;
    const float *logits = job->logits + row * V;
    const float temperature = job->temperature[row], top_p = job->top_p[row];
    float *z = scratch, *scores = z + (V + 63) / 64 * 64;
    long token = has_nan(logits, V) ? -1 : highest(logits, V);
    job->out[row] = token;
    if (token < 0 || temperature == 0.0f)
        return;
    const long k = job->top_k ? job->top_k[row] : 0;
    float limit = job->min_z ? job->min_z[row] : -INFINITY;
    if (top_p >= 1.0f && (k == 0 || k >= V) && limit == -INFINITY) {
        job->out[row] = draw_from_all(job, row, token);
        return;
    }

    const vf peak = vf_set1(logits[token]), divisor = vf_set1(temperature);
    vf total_mass = vf_zero();
    for (long i = 0; i < V; i += LANES_PER_COUNTER * VW) {
        uint32_t words[LANES_PER_COUNTER * VW];
        philox_words((uint32_t)(i / LANES_PER_COUNTER), job->index[row], job->choice[row],
                     job->seed[row], words);
        for (long j = 0; j < LANES_PER_COUNTER * VW && i + j < V; j += VW) {
            const long n = pm_min(VW, V - i - j);
            vf zv = vf_div(vf_sub(vf_load_n(logits + i + j, n), peak), divisor);
            vf_store_n(z + i + j, zv, n);
            vf_store_n(scores + i + j, vf_add(zv, gumbel(words + j)), n);
            if (n == VW)
                total_mass = vf_add(total_mass, vf_exp(zv));
        }
    }
    double total = vf_sum(total_mass);
    for (long i = V / VW * VW; i < V; i++)
        total += exp((double)z[i]);

    if (k > 0 && k < V) {
        const float kth = kth_largest(z, V, k, scores + (V + 63) / 64 * 64);
        total = 0.0;
        for (long i = 0; i < V; i++)
            if (z[i] >= kth)
                total += exp((double)z[i]);
        limit = kth > limit ? kth : limit;
    }
    if (limit > -INFINITY)
        for (long i = 0; i < V; i++)
            scores[i] = z[i] >= limit ? scores[i] : -INFINITY;
    token = highest(scores, V);
    while (top_p < 1.0f) {
        double before = 0.0;
        for (long i = 0; i < V; i++)
            if (ranks_before(z[i], i, z[token], token))
                before += exp((double)z[i]);
        if (before < (double)top_p * total || before == 0.0)
            break;
        const float limit_z = z[token];
        const long limit = token;
        token = -1;
        for (long i = 0; i < V; i++)
            if (ranks_before(z[i], i, limit_z, limit) && (token < 0 || scores[i] > scores[token]))
                token = i;
    }
    job->out[row] = token;
}
