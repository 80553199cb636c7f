/* Kernels for x86-64 processors with AVX-512 (F, BW, VL, DQ). */
#if defined(__x86_64__)
#define PM_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))
#define PM_HAVE_DPBF16 0
#define PM_TABLE pm_kernels_avx512
#define PM_NAME "avx512"
#define PM_SIMD "simd_avx512.h"
#define PM_RESIDENT "../weights/resident_avx512.h"
#define PM_FUSED 1
#define PM_PLAIN_C 0
#define PM_GEMM_MR 6
#define PM_DOT_T 6
#include "isa.inc.h"
#endif
