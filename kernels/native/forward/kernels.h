/* The jobs that the exported operations hand to the kernels of one instruction set. */
#ifndef PM_KERNELS_H
#define PM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "../weights/resident.h"
#include "../weights/resident_pack.h"

enum { PM_F32 = 0, PM_BF16 = 1, PM_DTYPES = 2 };

/* The weights of a linear, N rows of K elements: as they are, or where `rows` is NULL in the resident
 * form, for x in bfloat16. */
typedef struct {
    const void *rows;
    const pm_resident *resident;
} pm_matrix;

/* y[T, N] = x[T, K] w[N, K]^T + bias[N]; y in the dtype of x, or float32 where `y_f32`. */
typedef struct {
    const void *x;
    pm_matrix w;
    const void *bias;
    void *y;
    long T, N, K;
    int y_f32;
    long columns; /* of y per item, a multiple of 4 */
    long item_rows, row_items; /* rows of x per item, and items along T */
    long rows, depth; /* of a block: rows of x, elements of K */
    long panel; /* columns, a multiple of 4, which one tile of x after the other passes */
    int fused; /* resident weights are decoded on their way to the multiplier */
} pm_linear_job;

/* out = norm(x [+ residual]) * weight, rows of H; residual is updated in place where not NULL. */
typedef struct {
    const void *x, *weight;
    const void *residual;
    void *out, *new_residual;
    long T, H, unit;
    float eps;
} pm_norm_job;

/* Rows of gate_up[T, 2 I] -> out[T, I] = silu(gate) * up. */
typedef struct {
    const void *gate_up;
    void *out;
    long T, I, unit;
} pm_silu_job;

/* Rotates q and k in place and copies k and v to their slots. Row strides in elements. */
typedef struct {
    void *q, *k;
    const void *v;
    long q_stride, k_stride, v_stride;
    const float *cos_sin; /* [positions, D]: cosines of D/2 angles, then sines */
    const int64_t *positions, *slots;
    void *k_cache, *v_cache; /* [slots, Hk, D] */
    long T, Hq, Hk, D, unit;
} pm_rope_job;

typedef struct {
    const void *q; /* row stride q_stride elements, [Hq, D] within a row */
    const void *k_cache, *v_cache; /* [blocks, block_tokens, Hk, D] */
    void *out; /* [T, Hq, D] */
    const int32_t *query_starts, *context_lens, *block_tables;
    long q_stride, table_stride;
    long S, Hq, Hk, D, block_tokens;
    float scale;
    long items;
    long q_block; /* queries of one sequence per item */
} pm_attention_job;

typedef struct {
    const float *logits; /* [S, V] */
    const float *temperature, *top_p; /* [S] */
    const uint32_t *top_k; /* [S], 0: all; or NULL */
    const float *min_z; /* [S]; or NULL */
    const uint64_t *seed; /* [S] */
    const uint32_t *choice, *index; /* [S] */
    int64_t *out; /* [S]; -1 where a row has a NaN or no finite maximum */
    long V;
} pm_sample_job;

typedef struct {
    const char *name;
    long tile_rows; /* rows of x per tile of a linear */
    int fuses; /* has a fused product with resident weights */
    long block_element[PM_DTYPES]; /* bytes of an element of x while it is multiplied */
    void (*linear[PM_DTYPES])(const void *job, long item, void *scratch);
    size_t (*linear_scratch[PM_DTYPES])(const pm_linear_job *job);
    void (*norm[PM_DTYPES])(const void *job, long item, void *scratch);
    void (*silu_mul[PM_DTYPES])(const void *job, long item, void *scratch);
    void (*rope[PM_DTYPES])(const void *job, long item, void *scratch);
    void (*attention[PM_DTYPES])(const void *job, long item, void *scratch);
    size_t (*attention_scratch[PM_DTYPES])(const pm_attention_job *job);
    void (*sample)(const void *job, long item, void *scratch);
    long (*pack)(const pm_pack_part *part);
} pm_kernels;

/* What an item of an attention job is (phases.c). */
typedef struct {
    long sequence, kv_head;
    long query_lo, query_hi; /* within the sequence */
} pm_attention_item;
pm_attention_item pm_attention_locate(const pm_attention_job *job, long item);
/* Keys that the last query of an item sees. */
long pm_attention_keys(const pm_attention_job *job, const pm_attention_item *item);

/* Rows of an item whose scores exist at a time: with a tile's keys and values they stay in the first
 * cache. A multiple of every GEMM_MR and VW. */
enum { PART_ROWS = 48 };

/* How far ahead one stream of weights is prefetched: at 40 GB/s it comes 200 ns before its use. */
enum { AHEAD_BYTES = 8192 };

static inline size_t pm_round64(size_t bytes) { return (bytes + 63) & ~(size_t)63; }
static inline long pm_min(long a, long b) { return a < b ? a : b; }
static inline long pm_max(long a, long b) { return a > b ? a : b; }
static inline long pm_ceil_div(long a, long b) { return (a + b - 1) / b; }

extern const pm_kernels pm_kernels_portable;
#if defined(__x86_64__)
extern const pm_kernels pm_kernels_avx2, pm_kernels_avx512, pm_kernels_avx512_bf16;
#endif

#endif
