/* Builds the kernel table of one instruction set. The including file defines, beforehand:
 *   PM_TARGET         attribute of every function
 *   PM_HAVE_DPBF16    1 where the processor multiplies bf16 pairs
 *   PM_TABLE, PM_NAME the table, and its name for people
 *   PM_SIMD           the header to use
 *   PM_DOT_MAX_ROWS   {float32, bfloat16} rows of x up to which the dot kernel beats packing
 *                     (measured on Zen 5 with the shapes of a 135M model)
 *   PM_GEMM_MR, PM_DOT_T, PM_PV_HEADS
 *                     equal to the header's tiles: the preprocessor chooses their cases
 */
#include <math.h>
#include <string.h>

#include "kernels.h"
#include PM_SIMD
#include "vmath.h"

_Static_assert(PM_GEMM_MR == GEMM_MR && PM_DOT_T == DOT_T && PM_PV_HEADS == PV_HEADS,
               "tile sizes disagree");

#define PM_BF16 0
#include "element.h"
#include "gemm.inc.h"
#include "linear.inc.h"
#include "pointwise.inc.h"
#include "attention.inc.h"
#undef PM_BF16

#define PM_BF16 1
#include "element.h"
#include "gemm.inc.h"
#include "linear.inc.h"
#include "pointwise.inc.h"
#include "attention.inc.h"
#undef PM_BF16

#include "sample.inc.h"

#define BOTH(name) {name##_f32, name##_bf16}
const pm_kernels PM_TABLE = {
    .name = PM_NAME,
    .gemm_columns = GEMM_NP,
    .dot_max_rows = PM_DOT_MAX_ROWS,
    .linear_dot = BOTH(linear_dot),
    .linear_gemm = BOTH(linear_gemm),
    .linear_gemm_scratch = BOTH(linear_gemm_scratch),
    .norm = BOTH(norm),
    .silu_mul = BOTH(silu_mul),
    .rope = BOTH(rope),
    .attention = BOTH(attention),
    .attention_scratch = BOTH(attention_scratch),
    .sample = sample,
};
