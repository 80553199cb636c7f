/* Kernels in plain C for any processor. */
#define PM_TARGET
#define PM_HAVE_DPBF16 0
#define PM_TABLE pm_kernels_portable
#define PM_NAME "portable"
#define PM_SIMD "simd_portable.h"
#define PM_RESIDENT "../weights/resident_portable.h"
#define PM_FUSED 0
#define PM_PLAIN_C 1
#define PM_GEMM_MR 4
#define PM_DOT_T 2
#include "isa.inc.h"
