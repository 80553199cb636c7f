/* Kernels for x86-64 processors with AVX2 and FMA. */
#if defined(__x86_64__)
#define PM_TARGET __attribute__((target("avx2,fma")))
#define PM_HAVE_DPBF16 0
#define PM_TABLE pm_kernels_avx2
#define PM_NAME "avx2"
#define PM_SIMD "simd_avx2.h"
#define PM_RESIDENT "../weights/resident_avx2.h"
#define PM_FUSED 0
#define PM_PLAIN_C 0
#define PM_GEMM_MR 6
#define PM_DOT_T 2
#include "isa.inc.h"
#endif
