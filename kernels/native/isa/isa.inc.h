/* Builds the kernel table of one instruction set. The including file defines, beforehand:
 *   PM_TARGET         attribute of every function
 *   PM_HAVE_DPBF16    1 where the processor multiplies bf16 pairs
 *   PM_TABLE, PM_NAME the table, and its name for people
 *   PM_SIMD           the header to use
 *   PM_RESIDENT       likewise, for the resident form
 *   PM_FUSED          1 where it is decoded in registers
 *   PM_PLAIN_C        1 where vectors are arrays that the compiler vectorises
 *   PM_GEMM_MR, PM_DOT_T
 *                     equal to the header's tiles: the preprocessor chooses their cases
 */
#include <math.h>
#include <string.h>

#include "../forward/kernels.h"
#include PM_SIMD
#include PM_RESIDENT
#include "vmath.h"

_Static_assert(PM_GEMM_MR == GEMM_MR && PM_DOT_T == DOT_T, "tile sizes disagree");

#define PM_BF16 0
#include "element.h"
#include "../forward/gemm.inc.h"
#include "../forward/linear.inc.h"
#include "../forward/pointwise.inc.h"
#include "../forward/attention.inc.h"
#undef PM_BF16

#define PM_BF16 1
#include "element.h"
#include "../forward/gemm.inc.h"
#include "../weights/resident.inc.h"
#include "../forward/linear.inc.h"
#include "../forward/pointwise.inc.h"
#include "../forward/attention.inc.h"
#undef PM_BF16

#include "../forward/sample.inc.h"
#include "../weights/resident_pack.inc.h"

#define BOTH(name) {name##_f32, name##_bf16}
const pm_kernels PM_TABLE = {
    .name = PM_NAME,
    .tile_rows = DOT_T,
    .fuses = PM_FUSED,
    .block_element = {sizeof(float), PAIR_DOT ? sizeof(uint16_t) : sizeof(float)},
    .linear = BOTH(linear),
    .linear_scratch = BOTH(linear_scratch),
    .norm = BOTH(norm),
    .silu_mul = BOTH(silu_mul),
    .rope = BOTH(rope),
    .attention = BOTH(attention),
    .attention_scratch = BOTH(attention_scratch),
    .sample = sample,
    .pack = pack_part,
};
