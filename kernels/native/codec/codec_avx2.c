/* The codec for x86-64 processors with AVX2: eight lanes per vector, slots looked up in memory. */
#if defined(__x86_64__)
#include <immintrin.h>

#define PM_TARGET __attribute__((target("avx2,popcnt")))
#define PM_INLINE static inline __attribute__((always_inline))
#define PM_CODEC_OWN_ROWS
#include "codec_tile.inc.h"

/* For each set of lanes, which word lane j takes if the lanes of the set take words in order: bytes
 * j hold the number of lanes before j in the set. */
#define BEFORE(m, j) ((uint64_t)__builtin_popcount((m) & ((1 << (j)) - 1)) << (8 * (j)))
#define TAKES(m)                                                                                   \
    (BEFORE(m, 0) | BEFORE(m, 1) | BEFORE(m, 2) | BEFORE(m, 3) | BEFORE(m, 4) | BEFORE(m, 5) |     \
     BEFORE(m, 6) | BEFORE(m, 7))
#define TAKES4(m) TAKES(m), TAKES((m) + 1), TAKES((m) + 2), TAKES((m) + 3)
#define TAKES16(m) TAKES4(m), TAKES4((m) + 4), TAKES4((m) + 8), TAKES4((m) + 12)
#define TAKES64(m) TAKES16(m), TAKES16((m) + 16), TAKES16((m) + 32), TAKES16((m) + 48)
static const uint64_t takes[256] = {TAKES64(0), TAKES64(64), TAKES64(128), TAKES64(192)};

/* One step of eight lanes: their symbols; moves the states and `*words`. */
PM_TARGET PM_INLINE __m256i step(const uint32_t *slots, __m256i *state, const uint8_t **words)
{
    const __m256i x = *state;
    const __m256i slot = _mm256_and_si256(x, _mm256_set1_epi32(PM_CODEC_SLOTS - 1));
    const __m256i says = _mm256_i32gather_epi32((const int *)slots, slot, 4);
    const __m256i product = _mm256_mullo_epi32(_mm256_srli_epi32(says, 18),
                                               _mm256_srli_epi32(x, PM_CODEC_SLOT_BITS));
    const __m256i offset = _mm256_and_si256(_mm256_srli_epi32(says, 5), _mm256_set1_epi32(8191));
    const __m256i next = _mm256_add_epi32(
        product,
        _mm256_add_epi32(slot, _mm256_sub_epi32(offset, _mm256_set1_epi32(PM_CODEC_SLOTS))));
    const __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 16), _mm256_setzero_si256());
    const unsigned set = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(low));
    const __m256i order =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)&takes[set]));
    const __m256i fresh = _mm256_permutevar8x32_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)*words)), order);
    *state = _mm256_blendv_epi8(next, _mm256_or_si256(_mm256_slli_epi32(next, 16), fresh), low);
    *words += 2 * __builtin_popcount(set);
    return _mm256_and_si256(says, _mm256_set1_epi32(31));
}

PM_TARGET static void decode_rows(const pm_codec_decoder *decoder, uint32_t *state,
                                  const uint8_t **words, long rows, uint8_t *symbols)
{
    __m256i lanes[4];
    const uint8_t *at = *words;
    for (int i = 0; i < 4; i++)
        lanes[i] = _mm256_loadu_si256((const void *)(state + 8 * i));
    for (long row = 0; row < rows; row++) {
        const __m256i even0 = step(decoder->slots, &lanes[0], &at);
        const __m256i even1 = step(decoder->slots, &lanes[1], &at);
        const __m256i odd0 = step(decoder->slots, &lanes[2], &at);
        const __m256i odd1 = step(decoder->slots, &lanes[3], &at);
        const __m256i pairs =
            _mm256_packus_epi32(_mm256_or_si256(even0, _mm256_slli_epi32(odd0, 8)),
                                _mm256_or_si256(even1, _mm256_slli_epi32(odd1, 8)));
        /* Packing works within halves: their middle quarters change places. */
        _mm256_storeu_si256((void *)(symbols + row * PM_CODEC_LANES),
                            _mm256_permute4x64_epi64(pairs, 0xd8));
    }
    for (int i = 0; i < 4; i++)
        _mm256_storeu_si256((void *)(state + 8 * i), lanes[i]);
    *words = at;
}

PM_TARGET static const uint8_t *show_exponents(const pm_codec_table *table, uint8_t *symbols,
                                               long values, const uint8_t *escape,
                                               const uint8_t *end)
{
    const __m256i exponents =
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table->exponents));
    const int escape_symbol = table->has_escape ? table->count - 1 : PM_CODEC_SYMBOLS;
    for (long at = 0; at < values; at += PM_CODEC_LANES) {
        const __m256i row = _mm256_loadu_si256((const void *)(symbols + at));
        unsigned escaped = (unsigned)_mm256_movemask_epi8(
            _mm256_cmpeq_epi8(row, _mm256_set1_epi8((char)escape_symbol)));
        if (values - at < PM_CODEC_LANES)
            escaped &= (1u << (values - at)) - 1;
        _mm256_storeu_si256((void *)(symbols + at), _mm256_shuffle_epi8(exponents, row));
        for (; escaped != 0; escaped &= escaped - 1) {
            if (escape == end)
                return NULL;
            symbols[at + __builtin_ctz(escaped)] = *escape++;
        }
    }
    return escape;
}

const pm_codec_kernels pm_codec_avx2 = {
    .name = "avx2",
    .pieces = 1,
    .by_slot = 1,
    .checksum = checksum,
    .count = count_exponents,
    .encode = encode_tile,
    .decode = decode_tiles,
};
#endif
