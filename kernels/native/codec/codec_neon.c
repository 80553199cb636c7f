/* The codec for 64-bit ARM processors. */
#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

#define PM_TARGET
#define PM_INLINE static inline __attribute__((always_inline))
#define VECTOR 16
#include "codec_bytes.inc.h"

PM_INLINE vb look_up(vb table, vb index)
{
    return (vb)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
}

PM_INLINE vb choose(vb mask, vb yes, vb no)
{
    return (vb)vbslq_u8((uint8x16_t)mask, (uint8x16_t)yes, (uint8x16_t)no);
}

PM_INLINE vw times_high(vw a, vw b)
{
    const uint16x8_t x = (uint16x8_t)a, y = (uint16x8_t)b;
    const uint32x4_t low = vmull_u16(vget_low_u16(x), vget_low_u16(y));
    return (vw)vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(vmull_high_u16(x, y)));
}

/* A bit for each byte of zeros or ones. */
PM_INLINE uint32_t bits_of(uint8x16_t ones)
{
    static const uint8_t weights[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bits = vandq_u8(ones, vld1q_u8(weights));
    return vaddv_u8(vget_low_u8(bits)) | (uint32_t)vaddv_u8(vget_high_u8(bits)) << 8;
}

PM_INLINE uint32_t top_bits(vb x) { return bits_of(vcltzq_s8((int8x16_t)x)); }

PM_INLINE vb zip_low(vb a, vb b) { return (vb)vzip1q_u8((uint8x16_t)a, (uint8x16_t)b); }
PM_INLINE vb zip_high(vb a, vb b) { return (vb)vzip2q_u8((uint8x16_t)a, (uint8x16_t)b); }
PM_INLINE vw widen(const uint8_t *at) { return (vw)vmovl_u8(vld1_u8(at)); }

PM_INLINE uint32_t set_of(vw even, vw odd)
{
    return bits_of(vuzp1q_u8((uint8x16_t)even, (uint8x16_t)odd));
}

#include "codec_groups.inc.h"

const pm_codec_kernels pm_codec_neon = {
    .name = "neon",
    .pieces = PM_CODEC_PIECES,
    .checksum = checksum,
    .count = count_exponents,
    .encode = encode_tile,
    .decode = decode_tiles,
};
#endif
