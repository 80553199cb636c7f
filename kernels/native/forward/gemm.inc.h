/* Tile of a matrix product over packed B, and the packing. Shared by linear and attention.
 *
 * B is packed as [steps][GEMM_NP] words. With bf16 pairs (STEP 2) a word holds rows 2 s and 2 s + 1
 * of a column, so that one instruction multiplies and adds both.
 */
#ifndef PM_GEMM_ONCE
#define PM_GEMM_ONCE
enum { GEMM_NP = GEMM_NV * VW };
#endif

/* c[mr, GEMM_NP] (+)= a[mr, steps * STEP] b; mr is a constant wherever this is called. */
PM_INLINE void FN(gemm_tile_fixed)(const A *a, long lda, const uint32_t *b, long steps, float *c,
                                   long ldc, int accumulate, const int mr)
{
    vf acc[GEMM_MR][GEMM_NV];
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < GEMM_NV; j++)
            acc[i][j] = accumulate ? vf_load(c + i * ldc + j * VW) : vf_zero();
    for (long s = 0; s < steps; s++, b += GEMM_NP) {
        av column[GEMM_NV];
        for (int j = 0; j < GEMM_NV; j++)
            column[j] = b_load(b + j * VW);
        for (int i = 0; i < mr; i++) {
            av row = a_step(a + i * lda + s * STEP);
            for (int j = 0; j < GEMM_NV; j++)
                acc[i][j] = a_mul(acc[i][j], row, column[j]);
        }
    }
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < GEMM_NV; j++)
            vf_store(c + i * ldc + j * VW, acc[i][j]);
}

/* The same for m <= GEMM_MR rows. */
PM_TARGET static void FN(gemm_tile)(const A *a, long lda, const uint32_t *b, long steps, float *c,
                                    long ldc, int accumulate, long m)
{
    switch (m) {
    case 1: FN(gemm_tile_fixed)(a, lda, b, steps, c, ldc, accumulate, 1); break;
    case 2: FN(gemm_tile_fixed)(a, lda, b, steps, c, ldc, accumulate, 2); break;
    case 3: FN(gemm_tile_fixed)(a, lda, b, steps, c, ldc, accumulate, 3); break;
    case 4: FN(gemm_tile_fixed)(a, lda, b, steps, c, ldc, accumulate, 4); break;
#if PM_GEMM_MR > 4
    case 5: FN(gemm_tile_fixed)(a, lda, b, steps, c, ldc, accumulate, 5); break;
    case 6: FN(gemm_tile_fixed)(a, lda, b, steps, c, ldc, accumulate, 6); break;
#endif
    }
}

/* Copies n elements of E as A, zero up to `padded`. */
PM_INLINE void FN(copy_row)(A *dst, const E *src, long n, long padded)
{
#if PAIRS
    memcpy(dst, src, (size_t)n * sizeof *dst);
#else
    long i = 0;
    for (; i + VW <= n; i += VW)
        vf_store(dst + i, e_load(src + i));
    if (i < n)
        vf_store_n(dst + i, e_load_n(src + i, n - i), n - i);
#endif
    for (long j = n; j < padded; j++)
        dst[j] = 0;
}

/* Elements 2 j and 2 j + 1 (or j) of a row as one word; what lies beyond n elements reads as 0. */
PM_INLINE uint32_t FN(word)(const E *row, long j, long n)
{
#if PM_BF16
    uint32_t low = row[2 * j], high = 2 * j + 1 < n ? row[2 * j + 1] : 0;
    return low | high << 16;
#else
    uint32_t bits;
    (void)n;
    memcpy(&bits, row + j, sizeof bits);
    return bits;
#endif
}

/* Stores VW columns of `count` transposed words; bf16 pairs are split into floats without PAIRS. */
PM_INLINE void FN(store_words)(uint32_t *restrict dst, const uint32_t *restrict words, long first,
                                long count, long n)
{
    for (long j = 0; j < count; j++) {
#if PM_BF16 && !PAIRS
        uint32_t *even = dst + 2 * (first + j) * GEMM_NP, *odd = even + GEMM_NP;
        int has_odd = 2 * (first + j) + 1 < n;
        for (int i = 0; i < VW; i++)
            even[i] = words[j * VW + i] << 16;
        if (has_odd)
            for (int i = 0; i < VW; i++)
                odd[i] = words[j * VW + i] & 0xffff0000u;
#else
        (void)n;
        memcpy(dst + (first + j) * GEMM_NP, words + j * VW, VW * sizeof *dst);
#endif
    }
}

/* Packs B = rows^T: GEMM_NP rows of n elements each become columns. Starts loading `ahead`. */
PM_TARGET static void FN(pack_rows)(const E *const rows[GEMM_NP], const E *const ahead[GEMM_NP],
                                    long n, uint32_t *dst)
{
    const long per_word = PM_BF16 ? 2 : 1, words = pm_ceil_div(n, per_word), whole = n / per_word;
    for (int group = 0; group < GEMM_NP; group += VW) {
        long j = 0;
        for (; j + VW <= whole; j += VW) {
            const void *from[VW];
            for (int i = 0; i < VW; i++) {
                from[i] = rows[group + i] + j * per_word;
                __builtin_prefetch(ahead[group + i] + j * per_word);
            }
#if PM_BF16 && !PAIRS
            uint32_t tile[VW * VW];
            transpose_words(from, tile, VW);
            FN(store_words)(dst + group, tile, j, VW, n);
#else
            transpose_words(from, dst + group + j * GEMM_NP, GEMM_NP);
#endif
        }
        for (; j < words; j++) {
            uint32_t column[VW];
            for (int i = 0; i < VW; i++)
                column[i] = FN(word)(rows[group + i], j, n);
            FN(store_words)(dst + group, column, j, 1, n);
        }
    }
}
