/* One element type: E in memory, float32 in registers. Included once per dtype with PM_BF16 set to
 * 0 or 1; redefines its macros each time. FN(name) is the name of the instance.
 *
 * Two views of the arithmetic:
 *   dot   d_*  vectors of DW elements along the summed axis, from A; dw_* from W: weights as they
 *              are stored, or widened to A beforehand where that is slow in the midst of it;
 *   gemm  a_*  one step (STEP elements) of a row of A, against VW columns of packed B. B is packed
 *              as words of 32 bits: one float, or a bf16 pair where the processor multiplies pairs.
 */
#undef E
#undef A
#undef FN
#undef PAIRS
#undef e_load
#undef e_load_n
#undef e_store
#undef e_store_n
#undef dv
#undef DW
#undef d_load
#undef d_load_n
#undef d_dot
#undef W
#undef dw_load
#undef dw_load_n
#undef STEP
#undef av
#undef a_step
#undef b_load
#undef a_mul

#if PM_BF16
#define E uint16_t
#define FN(name) name##_bf16
#define e_load vf_load_bf16
#define e_load_n vf_load_bf16_n
#define e_store vf_store_bf16
#define e_store_n vf_store_bf16_n
#else
#define E float
#define FN(name) name##_f32
#define e_load vf_load
#define e_load_n vf_load_n
#define e_store vf_store
#define e_store_n vf_store_n
#endif

#if PM_BF16 && PM_HAVE_DPBF16
#define PAIRS 1
#define A uint16_t
#define dv vb
#define DW BW
#define d_load vb_load
#define d_load_n vb_load_n
#define d_dot vb_dot
#define STEP 2
#define av vb
#define a_step vb_pair
#define b_load vb_load_words
#define a_mul vb_dot
#else
#define PAIRS 0
#define A float
#define dv vf
#define DW VW
#define d_load vf_load
#define d_load_n vf_load_n
#define d_dot(acc, a, b) vf_fma(a, b, acc)
#define STEP 1
#define av vf
#define a_step(p) vf_set1(*(p))
#define b_load(p) vf_load((const float *)(p))
#define a_mul(acc, a, b) vf_fma(a, b, acc)
#endif

#if PAIRS || PM_PLAIN_C
#define W A
#define dw_load d_load
#define dw_load_n d_load_n
#else
#define W E
#define dw_load e_load
#define dw_load_n e_load_n
#endif
