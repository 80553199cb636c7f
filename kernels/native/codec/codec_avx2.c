/* The codec for x86-64 processors with AVX2. */
#if defined(__x86_64__)
#include <immintrin.h>

#define PM_TARGET __attribute__((target("avx2,popcnt")))
#define PM_INLINE static inline __attribute__((always_inline))
#define VECTOR 32
#define PM_CODEC_OWN_ROWS
#include "codec_bytes.inc.h"
#include "codec_takes.h"

PM_TARGET PM_INLINE vb look_up(vb table, vb index)
{
    return (vb)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
}

PM_TARGET PM_INLINE vb choose(vb mask, vb yes, vb no)
{
    return (vb)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, (__m256i)mask);
}

PM_TARGET PM_INLINE vw times_high(vw a, vw b)
{
    return (vw)_mm256_mulhi_epu16((__m256i)a, (__m256i)b);
}

PM_TARGET PM_INLINE uint32_t top_bits(vb x) { return (uint32_t)_mm256_movemask_epi8((__m256i)x); }

PM_TARGET PM_INLINE vb zip_low(vb a, vb b)
{
    return (vb)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
}

PM_TARGET PM_INLINE vb zip_high(vb a, vb b)
{
    return (vb)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
}

PM_TARGET PM_INLINE void put_pair(uint8_t *out, vb low, vb high)
{
    _mm_storeu_si128((void *)out, _mm256_castsi256_si128((__m256i)low));
    _mm_storeu_si128((void *)(out + 16), _mm256_castsi256_si128((__m256i)high));
    _mm_storeu_si128((void *)(out + 32), _mm256_extracti128_si256((__m256i)low, 1));
    _mm_storeu_si128((void *)(out + 48), _mm256_extracti128_si256((__m256i)high, 1));
}

PM_TARGET PM_INLINE vw widen(const uint8_t *at)
{
    return (vw)_mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)at));
}

PM_TARGET PM_INLINE vb broadcast(const uint8_t *at)
{
    return (vb)_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)at));
}

/* Sixteen bytes, twice. */
PM_TARGET PM_INLINE __m256i halves(const uint8_t *low, const uint8_t *high)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const void *)low)),
                                   _mm_loadu_si128((const void *)high), 1);
}

/* Of the words that a set of lanes takes. */
PM_TARGET PM_INLINE size_t bytes_of(uint32_t set) { return 2 * (size_t)_mm_popcnt_u64(set); }

PM_TARGET PM_INLINE void take_words(lane_states *lanes, const vw *even, const vw *odd,
                                    const uint8_t **words)
{
    /* Bytes of the set, from the lowest: even lanes 0..7, odd ones, even lanes 8..15, odd ones. */
    const __m256i both = _mm256_packs_epi16((__m256i)even[0], (__m256i)odd[0]);
    const uint32_t set = (uint32_t)_mm256_movemask_epi8(both);
    const uint8_t *at = *words;
    const __m256i even_order = halves(takes[set & 255], takes[set >> 16 & 255]);
    const __m256i odd_order = halves(takes[set >> 8 & 255], takes[set >> 24]);
    const __m256i even_fresh = halves(at, at + bytes_of(set & 0xff));
    const __m256i odd_fresh = halves(at + bytes_of(set & 0xff00ff), at + bytes_of(set & 0xffffff));
    lane_group *group = &lanes->groups[0];
    const vb even_new = look_up((vb)even_fresh, (vb)even_order);
    const vb odd_new = look_up((vb)odd_fresh, (vb)odd_order);
    group->even_low = (vw)choose((vb)even[0], even_new, (vb)group->even_low);
    group->odd_low = (vw)choose((vb)odd[0], odd_new, (vb)group->odd_low);
    *words = at + bytes_of(set);
}

#include "codec_avx2_encode.inc.h"

const pm_codec_kernels pm_codec_avx2 = {
    .name = "avx2",
    .pieces = PM_CODEC_PIECES,
    .checksum = checksum,
    .count = count_exponents,
    .encode = encode_tile,
    .decode = decode_tiles,
};
#endif
