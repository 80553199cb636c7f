/* A pre-norm decoder and one ragged batch for it; mirrored in decoder.py. */
#ifndef PM_DECODER_H
#define PM_DECODER_H

#include "kernels.h"

typedef struct {
    const void *attention_norm, *mlp_norm; /* [H] */
    pm_matrix qkv;     /* [(Hq + 2 Hk) D, H] */
    pm_matrix output;  /* [H, Hq D] */
    pm_matrix gate_up; /* [2 I, H] */
    pm_matrix down;    /* [H, I] */
} pm_layer;

typedef struct {
    pm_matrix embedding; /* [V, H] */
    const pm_layer *layers;
    const void *final_norm;
    pm_matrix head; /* [V, H] */
    const float *cos_sin; /* [positions, D] */
    long num_layers, num_positions, H, I, V, Hq, Hk, D;
    float eps, scale;
} pm_decoder;

/* Arrays as in kernels/meta.py: T tokens of S sequences, of which R rows want logits. */
typedef struct {
    const int64_t *ids, *positions, *slots, *logit_rows;
    const int32_t *query_starts, *context_lens, *block_tables;
    void *k_cache, *v_cache; /* [layers, blocks, block_tokens, Hk, D] */
    void *workspace;         /* pm_workspace_bytes; keeps what one stage leaves to the next */
    float *logits;           /* [R, V] */
    long T, S, R, table_stride, block_tokens, layer_bytes;
} pm_step;

#endif
