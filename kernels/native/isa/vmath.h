/* exp and log of float vectors, from the primitives of the instruction set in use.
 *
 * Series on the reduced ranges below. Measured against double precision in steps of 1e-5: relative
 * error of vf_exp at most 1.1e-7 for normal results, of vf_log at most 1.1e-7 max(1, |log x|) in
 * absolute terms; of vf_exp2 at most 1.7e-7.
 */

/* e^x; 0 from -104 down, +inf from 89 up, NaN for NaN. */
PM_INLINE vf vf_exp(vf x)
{
    /* x = n ln2 + r, |r| <= ln2 / 2; ln2 in two parts so that n ln2 is exact to float32. */
    x = vf_min(vf_set1(89.0f), vf_max(vf_set1(-104.0f), x)); /* this order lets NaN through */
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504f)));
    vf r = vf_fma(n, vf_set1(-0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.0f / 5040);
    p = vf_fma(p, r, vf_set1(1.0f / 720));
    p = vf_fma(p, r, vf_set1(1.0f / 120));
    p = vf_fma(p, r, vf_set1(1.0f / 24));
    p = vf_fma(p, r, vf_set1(1.0f / 6));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_scale2(p, n);
}

/* 2^x for x <= 127; 1 for 0, 0 from -150 down, NaN for NaN. */
PM_INLINE vf vf_exp2(vf x)
{
    x = vf_max(vf_set1(-150.0f), x);
    const vf n = vf_round(x), r = vf_sub(x, n);
    vf p = vf_set1(1.32647273e-3f); /* least relative error on |r| <= 1/2 of those that have p(0) = 1 */
    p = vf_fma(p, r, vf_set1(9.67151299e-3f));
    p = vf_fma(p, r, vf_set1(5.55073358e-2f));
    p = vf_fma(p, r, vf_set1(2.40222424e-1f));
    p = vf_fma(p, r, vf_set1(6.93147004e-1f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_scale2(p, n);
}

/* Natural logarithm of normal x > 0. */
PM_INLINE vf vf_log(vf x)
{
    /* x = m 2^e, m in [0.75, 1.5); log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.2. */
    vf e;
    vf m = vf_split(x, &e);
    vf s = vf_div(vf_sub(m, vf_set1(1.0f)), vf_add(m, vf_set1(1.0f)));
    vf z = vf_mul(s, s);
    vf p = vf_set1(2.0f / 11);
    p = vf_fma(p, z, vf_set1(2.0f / 9));
    p = vf_fma(p, z, vf_set1(2.0f / 7));
    p = vf_fma(p, z, vf_set1(2.0f / 5));
    p = vf_fma(p, z, vf_set1(2.0f / 3));
    vf log_m = vf_fma(vf_mul(p, z), s, vf_add(s, s));
    return vf_fma(e, vf_set1(0.693359375f), vf_fma(e, vf_set1(-2.12194440e-4f), log_m));
}

/* x * sigmoid(x) */
PM_INLINE vf vf_silu(vf x)
{
    vf e = vf_exp(vf_sub(vf_zero(), x));
    return vf_div(x, vf_add(vf_set1(1.0f), e));
}
