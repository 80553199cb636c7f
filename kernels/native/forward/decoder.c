/* A whole forward pass in one call: the operations of kernels/reference/decoder.py, in that order and
 * with the bits that they have one by one. Between them nothing returns to Python, so that workers
 * are still awake and activations still in cache when the next one begins, and nothing is allocated.
 *
 * Stage i of L layers ends when the K and V of layer i are in the cache; stage L gives the logits. So
 * a caller that streams KV away runs stage by stage, and any other all of them at once.
 *
 * In the last layer only rows that want logits go on after the attention: no row needs another there.
 */
#include "decoder.h"

#include <string.h>

#include "phases.h"

enum { PM_OK = 0, PM_NO_MEMORY = -1, PM_OUT_OF_RANGE = -2 };

typedef struct {
    const pm_context *context;
    int dtype;
    size_t element;
    const pm_decoder *model;
    const pm_step *step;
    char *x, *residual; /* [T, H] */
    char *wide;         /* [T, (Hq + 2 Hk) D], then [T, 2 I] */
    char *narrow;       /* [T, Hq D], then [T, I] */
    size_t bytes;
} pm_run;

static pm_run lay_out(const pm_context *context, int dtype, const pm_decoder *model, const pm_step *step)
{
    pm_run run = {.context = context, .dtype = dtype,
                  .element = dtype == PM_BF16 ? sizeof(uint16_t) : sizeof(float),
                  .model = model, .step = step};
    const long qkv = (model->Hq + 2 * model->Hk) * model->D;
    char *const memory = step->workspace;
#define PLACE(field, width)      \
    run.field = memory + run.bytes; \
    run.bytes += pm_round64((size_t)(step->T * (width)) * run.element)
    PLACE(x, model->H);
    PLACE(residual, model->H);
    PLACE(wide, pm_max(model->H, pm_max(qkv, 2 * model->I)));
    PLACE(narrow, pm_max(model->Hq * model->D, model->I));
#undef PLACE
    return run;
}

static char *row(const pm_run *run, const void *base, long index, long width)
{
    return (char *)base + (size_t)(index * width) * run->element;
}

static int multiply(const pm_run *run, const void *x, pm_matrix w, void *y, long T, long N, long K)
{
    return pm_run_linear(run->context, run->dtype,
                         (pm_linear_job){.x = x, .w = w, .y = y, .T = T, .N = N, .K = K});
}

/* x = norm(residual += x), in place. */
static int add_norm(const pm_run *run, const void *weight, long T)
{
    return pm_run_norm(run->context, run->dtype,
                       (pm_norm_job){.x = run->x, .weight = weight, .residual = run->residual,
                                     .out = run->x, .new_residual = run->residual, .T = T,
                                     .H = run->model->H, .eps = run->model->eps});
}

static int embed(const pm_run *run)
{
    const pm_decoder *model = run->model;
    const pm_step *step = run->step;
    for (long t = 0; t < step->T; t++) {
        if (step->ids[t] < 0 || step->ids[t] >= model->V || step->positions[t] < 0 ||
            step->positions[t] >= model->num_positions)
            return PM_OUT_OF_RANGE;
        char *const x = row(run, run->x, t, model->H);
        if (model->embedding.rows == NULL)
            pm_resident_row(model->embedding.resident, model->H, step->ids[t], (uint16_t *)x);
        else
            memcpy(x, row(run, model->embedding.rows, step->ids[t], model->H),
                   (size_t)model->H * run->element);
    }
    for (long r = 0; r < step->R; r++)
        if (step->logit_rows[r] < 0 || step->logit_rows[r] >= step->T || step->R > step->T)
            return PM_OUT_OF_RANGE;
    memset(run->residual, 0, (size_t)(step->T * model->H) * run->element);
    return PM_OK;
}

/* The first half of a layer: up to K and V in the cache. */
static int begin_layer(const pm_run *run, long index)
{
    const pm_decoder *m = run->model;
    const pm_step *step = run->step;
    const pm_layer *layer = &m->layers[index];
    const long width = (m->Hq + 2 * m->Hk) * m->D;
    char *k = row(run, run->wide, 1, m->Hq * m->D), *v = row(run, k, 1, m->Hk * m->D);
    int code;
    if ((code = add_norm(run, layer->attention_norm, step->T)) ||
        (code = multiply(run, run->x, layer->qkv, run->wide, step->T, width, m->H)))
        return code;
    return pm_run_rope(run->context, run->dtype,
                       (pm_rope_job){.q = run->wide, .k = k, .v = v, .q_stride = width,
                                     .k_stride = width, .v_stride = width, .cos_sin = m->cos_sin,
                                     .positions = step->positions, .slots = step->slots,
                                     .k_cache = (char *)step->k_cache + index * step->layer_bytes,
                                     .v_cache = (char *)step->v_cache + index * step->layer_bytes,
                                     .T = step->T, .Hq = m->Hq, .Hk = m->Hk, .D = m->D});
}

/* Moves the rows that want logits to the front, by way of `wide`, which is free then. */
static void gather(const pm_run *run, char *base, long width)
{
    const long R = run->step->R;
    for (long r = 0; r < R; r++)
        memcpy(row(run, run->wide, r, width), row(run, base, run->step->logit_rows[r], width),
               (size_t)width * run->element);
    memcpy(base, run->wide, (size_t)(R * width) * run->element);
}

/* The second half of a layer: attention and MLP. */
static int finish_layer(const pm_run *run, long index)
{
    const pm_decoder *m = run->model;
    const pm_step *step = run->step;
    const pm_layer *layer = &m->layers[index];
    const long width = (m->Hq + 2 * m->Hk) * m->D;
    long T = step->T;
    int code = pm_run_attention(
        run->context, run->dtype,
        (pm_attention_job){.q = run->wide,
                           .k_cache = (char *)step->k_cache + index * step->layer_bytes,
                           .v_cache = (char *)step->v_cache + index * step->layer_bytes,
                           .out = run->narrow, .query_starts = step->query_starts,
                           .context_lens = step->context_lens, .block_tables = step->block_tables,
                           .q_stride = width, .table_stride = step->table_stride, .S = step->S,
                           .Hq = m->Hq, .Hk = m->Hk, .D = m->D,
                           .block_tokens = step->block_tokens, .scale = m->scale});
    if (code)
        return code;
    if (index == m->num_layers - 1) {
        T = step->R;
        gather(run, run->narrow, m->Hq * m->D);
        gather(run, run->residual, m->H);
    }
    if ((code = multiply(run, run->narrow, layer->output, run->x, T, m->H, m->Hq * m->D)) ||
        (code = add_norm(run, layer->mlp_norm, T)) ||
        (code = multiply(run, run->x, layer->gate_up, run->wide, T, 2 * m->I, m->H)) ||
        (code = pm_run_silu_mul(
             run->context, run->dtype,
             (pm_silu_job){.gate_up = run->wide, .out = run->narrow, .T = T, .I = m->I})))
        return code;
    return multiply(run, run->narrow, layer->down, run->x, T, m->H, m->I);
}

/* Logits of the rows that want them, which lie in front. */
static int head(const pm_run *run)
{
    const pm_decoder *m = run->model;
    const long R = run->step->R;
    int code = add_norm(run, m->final_norm, R);
    if (code)
        return code;
    return pm_run_linear(run->context, run->dtype,
                         (pm_linear_job){.x = run->x, .w = m->head, .y = run->step->logits, .T = R,
                                         .N = m->V, .K = m->H, .y_f32 = 1});
}

PM_API size_t pm_workspace_bytes(int dtype, const pm_decoder *model, long T)
{
    static char nothing[1];
    const pm_step step = {.workspace = nothing, .T = T};
    return lay_out(NULL, dtype, model, &step).bytes;
}

/* Runs stages [begin, end) of 0..num_layers. Returns 0, -1 without memory, -2 where an id, a position
 * or a logit row is out of range. */
PM_API int pm_forward(const pm_context *context, int dtype, const pm_decoder *model,
                      const pm_step *step, long begin, long end)
{
    const pm_run run = lay_out(context, dtype, model, step);
    int code = PM_OK;
    for (long stage = begin; stage < end && code == PM_OK; stage++) {
        if (stage == model->num_layers && step->R == 0)
            break;
        code = stage == 0 ? embed(&run) : finish_layer(&run, stage - 1);
        if (code == PM_OK)
            code = stage < model->num_layers ? begin_layer(&run, stage) : head(&run);
    }
    return code;
}
