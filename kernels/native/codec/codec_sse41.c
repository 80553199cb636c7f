/* The codec for x86-64 processors with SSE4.1 and no AVX2: small ones of before 2022. */
#if defined(__x86_64__)
#include <immintrin.h>

#define PM_TARGET __attribute__((target("sse4.1,popcnt")))
#define PM_INLINE static inline __attribute__((always_inline))
#define VECTOR 16
#include "codec_bytes.inc.h"

PM_TARGET PM_INLINE vb look_up(vb table, vb index)
{
    return (vb)_mm_shuffle_epi8((__m128i)table, (__m128i)index);
}

PM_TARGET PM_INLINE vb choose(vb mask, vb yes, vb no)
{
    return (vb)_mm_blendv_epi8((__m128i)no, (__m128i)yes, (__m128i)mask);
}

PM_TARGET PM_INLINE vw times_high(vw a, vw b)
{
    return (vw)_mm_mulhi_epu16((__m128i)a, (__m128i)b);
}

PM_TARGET PM_INLINE uint32_t top_bits(vb x) { return (uint32_t)_mm_movemask_epi8((__m128i)x); }

PM_TARGET PM_INLINE vb zip_low(vb a, vb b)
{
    return (vb)_mm_unpacklo_epi8((__m128i)a, (__m128i)b);
}

PM_TARGET PM_INLINE vb zip_high(vb a, vb b)
{
    return (vb)_mm_unpackhi_epi8((__m128i)a, (__m128i)b);
}

PM_TARGET PM_INLINE vw widen(const uint8_t *at)
{
    return (vw)_mm_cvtepu8_epi16(_mm_loadl_epi64((const void *)at));
}

PM_TARGET PM_INLINE uint32_t set_of(vw even, vw odd)
{
    return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16((__m128i)even, (__m128i)odd));
}

#include "codec_groups.inc.h"

const pm_codec_kernels pm_codec_sse41 = {
    .name = "sse41",
    .pieces = PM_CODEC_PIECES,
    .checksum = checksum,
    .count = count_exponents,
    .encode = encode_tile,
    .decode = decode_tiles,
};
#endif
