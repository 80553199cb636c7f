/* The codec for x86-64 processors with AVX-512 (F, BW, VL, DQ).
 *
 * Decoding keeps all tables in registers: a row of 32 lanes is two vectors, of even and of odd
 * positions, whose results an "or" brings into order. A step of a lane waits some 40 cycles for the
 * one before, so four tiles are decoded at once (Zen 5, GB/s of bfloat16 from the cache: one tile
 * 5.4, two 10, four 13).
 */
#if defined(__x86_64__)
#include <immintrin.h>

#define PM_TARGET __attribute__((target("avx2,bmi2,popcnt,lzcnt,avx512f,avx512bw,avx512vl,"   \
                                        "avx512dq")))
#define PM_INLINE static inline __attribute__((always_inline))
#define PM_CODEC_OWN_DECODE
#define PM_CODEC_OWN_SPLIT
#define PM_CODEC_OWN_ROWS
#define PM_CODEC_OWN_SYMBOLS
#include "codec_tile.inc.h"

/* Tables by part (see pm_codec_table): in dwords, the own ones and the aliases'. */
typedef struct {
    __m512i last; /* by bucket: its last own slot << 20, and ones below */
    __m512i factor[2]; /* frequency - 4096 */
    __m512i offset[2];
    __m512i shown[2]; /* exponent where it goes, or the mark of the escape */
} decode_tables;

typedef struct {
    __m512i even, odd;
} lane_states;

typedef __m512i hash_lanes;

PM_TARGET PM_INLINE lane_states load_lanes(const uint8_t *section)
{
    return (lane_states){_mm512_loadu_si512(section), _mm512_loadu_si512(section + 64)};
}

PM_TARGET PM_INLINE int at_rest(lane_states lanes)
{
    const __m512i rest = _mm512_set1_epi32(PM_CODEC_LOW);
    const __m512i wrong =
        _mm512_or_si512(_mm512_xor_si512(lanes.even, rest), _mm512_xor_si512(lanes.odd, rest));
    return _mm512_test_epi32_mask(wrong, wrong) == 0;
}

PM_TARGET PM_INLINE hash_lanes load_hash(const uint32_t *lanes)
{
    return _mm512_loadu_si512(lanes);
}

PM_TARGET PM_INLINE void store_hash(uint32_t *lanes, hash_lanes hash)
{
    _mm512_storeu_si512(lanes, hash);
}

#include "codec_flight.inc.h"

/* Exponents appear where they belong in a value, the escape as the bit of the sign. */
PM_TARGET PM_INLINE decode_tables load_tables(const pm_codec_table *table, int type)
{
    const uint32_t flag = ONE_BYTE(type) ? 0x80 : 0x8000;
    uint32_t last[16], factor[32], offset[32], shown[32];
    for (int part = 0; part < 32; part++) {
        const int symbol = table->part_symbol[part];
        const int escape = table->has_escape && symbol == table->count - 1;
        factor[part] = (uint32_t)table->frequencies[symbol] - PM_CODEC_SLOTS;
        offset[part] = (uint32_t)table->part_offset[part];
        shown[part] = escape ? flag : (uint32_t)table->exponents[symbol] << type;
    }
    for (int bucket = 0; bucket < 16; bucket++) /* a limit is never 0: every symbol has a slot */
        last[bucket] = (table->limit[bucket] << 20) - 1;
    return (decode_tables){
        _mm512_loadu_si512(last),
        {_mm512_loadu_si512(factor), _mm512_loadu_si512(factor + 16)},
        {_mm512_loadu_si512(offset), _mm512_loadu_si512(offset + 16)},
        {_mm512_loadu_si512(shown), _mm512_loadu_si512(shown + 16)},
    };
}

/* One step of 16 lanes: what is shown of their symbols; moves the states and `*words`. */
PM_TARGET PM_INLINE __m512i step(const decode_tables *tables, __m512i *state, const uint8_t **words)
{
    const __m512i x = *state;
    const __m512i bucket = _mm512_srli_epi32(x, 8); /* permutations look at its low four bits */
    const __mmask16 alias = _mm512_cmpgt_epu32_mask(
        _mm512_slli_epi32(x, 20), _mm512_permutexvar_epi32(bucket, tables->last));
    __m512i part = _mm512_and_si512(bucket, _mm512_set1_epi32(15));
    part = _mm512_mask_or_epi32(part, alias, part, _mm512_set1_epi32(16));
    const __m512i factor =
        _mm512_permutex2var_epi32(tables->factor[0], part, tables->factor[1]);
    const __m512i offset =
        _mm512_permutex2var_epi32(tables->offset[0], part, tables->offset[1]);
    const __m512i shown = _mm512_permutex2var_epi32(tables->shown[0], part, tables->shown[1]);
    /* frequency (x / 4096) + x mod 4096 = x + (frequency - 4096) (x / 4096) */
    const __m512i product = _mm512_mullo_epi32(factor, _mm512_srli_epi32(x, PM_CODEC_SLOT_BITS));
    const __m512i next = _mm512_add_epi32(_mm512_add_epi32(x, offset), product);
    const __mmask16 low = _mm512_cmplt_epu32_mask(next, _mm512_set1_epi32(PM_CODEC_LOW));
    const __m512i fresh = _mm512_maskz_expand_epi32(
        low, _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)*words)));
    *state = _mm512_mask_or_epi32(next, low, _mm512_slli_epi32(next, 16), fresh);
    *words += 2 * _mm_popcnt_u32(low);
    return shown;
}

/* The escapes of the marked positions, in order. */
PM_TARGET PM_INLINE __m512i put_escapes(__m512i row, __mmask32 escaped, flight *f, int type)
{
    while (__builtin_expect(escaped != 0, 0)) {
        if (f->escape == f->escape_end) {
            f->good = 0;
            break;
        }
        const __mmask32 first = escaped & -escaped;
        const int exponent = *f->escape++ << type;
        row = ONE_BYTE(type) ? _mm512_mask_set1_epi8(row, first, (char)exponent)
                             : _mm512_mask_set1_epi16(row, first, (short)exponent);
        escaped -= first;
    }
    return row;
}

/* The positions `valid` of a row: exponents where they go in 32 words, or in 32 bytes. */
PM_TARGET PM_INLINE __m512i exponents_of_row(const decode_tables *tables, flight *f, int type,
                                             __mmask32 valid)
{
    const __m512i even = step(tables, &f->lanes.even, &f->words);
    const __m512i odd = step(tables, &f->lanes.odd, &f->words);
    if (!ONE_BYTE(type)) {
        const __m512i row = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
        return put_escapes(row, _mm512_movepi16_mask(row) & valid, f, type);
    }
    const __m256i row = _mm512_cvtepi32_epi16(_mm512_or_si512(even, _mm512_slli_epi32(odd, 8)));
    return put_escapes(_mm512_castsi256_si512(row), _mm256_movepi8_mask(row) & valid, f, type);
}

/* Puts sign and mantissa of 32 values to their exponents. */
PM_TARGET PM_INLINE __m512i with_rest(__m512i row, int type, const uint8_t *wide,
                                      const uint8_t *twos, const uint8_t *ones)
{
    if (type == TYPE_BF16) {
        /* Each byte twice in a word: the sign is in place in one, the mantissa in the other. */
        const __m512i twice = _mm512_shuffle_epi8(
            _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)wide)),
            _mm512_set4_epi32(0x0e0e0c0c, 0x0a0a0808, 0x06060404, 0x02020000));
        /* row | (twice & mask) */
        return _mm512_ternarylogic_epi32(row, twice, _mm512_set1_epi16((short)0x807f), 0xf8);
    }
    if (type == TYPE_E4M3) {
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)wide));
        const __m256i halves = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4));
        const __m256i mantissa = _mm256_and_si256(halves, _mm256_set1_epi8(7));
        const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(halves, 4),
                                              _mm256_set1_epi8((char)0x80));
        return _mm512_or_si512(row, _mm512_castsi256_si512(_mm256_or_si256(mantissa, sign)));
    }
    const uint64_t two = *(const pm_u64 *)twos;
    const __mmask32 low = (__mmask32)_pext_u64(two, 0x5555555555555555);
    const __mmask32 high = (__mmask32)_pext_u64(two, 0xaaaaaaaaaaaaaaaa);
    const __mmask32 sign = *(const pm_u32 *)ones;
    if (type == TYPE_F16) {
        const __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)wide));
        const __m512i above = _mm512_or_si512(_mm512_maskz_set1_epi16(low, 0x100),
                                              _mm512_maskz_set1_epi16(high, 0x200));
        row = _mm512_or_si512(row, _mm512_or_si512(byte, above));
        return _mm512_or_si512(row, _mm512_maskz_set1_epi16(sign, (short)0x8000));
    }
    row = _mm512_or_si512(row, _mm512_or_si512(_mm512_maskz_set1_epi8(low, 1),
                                               _mm512_maskz_set1_epi8(high, 2)));
    return _mm512_or_si512(row, _mm512_maskz_set1_epi8(sign, (char)0x80));
}

PM_TARGET PM_INLINE __m512i hash_step(__m512i hash, __m512i row)
{
    const __m512i spread = _mm512_mullo_epi32(row, _mm512_set1_epi32((int)HASH_Q));
    const __m512i mixed = _mm512_rol_epi32(_mm512_add_epi32(hash, spread), 13);
    return _mm512_mullo_epi32(mixed, _mm512_set1_epi32((int)HASH_P));
}

PM_TARGET PM_INLINE void decode_row(const decode_tables *tables, flight *f, int type)
{
    __m512i row = exponents_of_row(tables, f, type, 0xffffffff);
    row = with_rest(row, type, f->wide, f->twos, f->ones);
    if (ONE_BYTE(type)) {
        _mm256_storeu_si256((void *)f->out, _mm512_castsi512_si256(row));
    } else {
        f->hash = hash_step(f->hash, row);
        _mm512_storeu_si512(f->out, row);
    }
    move_on(f, type);
}

PM_TARGET PM_INLINE void decode_part(const decode_tables *tables, flight *f, int type, long count)
{
    const __mmask32 valid = (1u << count) - 1;
    const row_planes part = part_of_planes(f, type, count);
    const __m512i row = with_rest(exponents_of_row(tables, f, type, valid), type, part.wide,
                                  part.twos, part.ones);
    if (ONE_BYTE(type)) {
        _mm256_mask_storeu_epi8(f->out, valid, _mm512_castsi512_si256(row));
    } else {
        f->hash = hash_step(f->hash, _mm512_maskz_mov_epi16(valid, row));
        _mm512_mask_storeu_epi16(f->out, valid, row);
    }
}

#include "codec_avx512_encode.inc.h"

const pm_codec_kernels pm_codec_avx512 = {
    .name = "avx512",
    .pieces = PM_CODEC_PIECES,
    .checksum = checksum,
    .count = count_exponents,
    .encode = encode_tile,
    .decode = decode_tiles,
};
#endif
