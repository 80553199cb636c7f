/* Damages coded blocks and decodes them, with every instruction set of this processor:
 *
 *     codec_fuzz SEED ROUNDS
 *
 * Built with the sanitizers and the sources of the codec. Each buffer is an allocation of its own,
 * exactly as long as it may be used, so that the sanitizer sees every byte too far. Some damage is
 * done by a forger who keeps the header consistent, so that the deeper checks are reached. Ends
 * with 1 if damage is not noticed, and prints what it did.
 */
#include <stdio.h>
#include <stdlib.h>

#include "codec/codec.h"

long pm_codec_bound(long bytes);
long pm_codec_encode(const char *isa, const uint8_t *data, long bytes, int dtype, uint8_t *out,
                     int threads);
long pm_codec_check(const char *isa, const uint8_t *block, long bytes);
int pm_codec_decode(const char *isa, const uint8_t *block, long bytes, uint8_t *out, long out_bytes,
                    int threads);

int pm_codec_decode_run(const char *isa, const uint8_t *stored, long bytes, uint8_t *out,
                        long out_bytes);

enum { HEAD = 16, TABLE = 48, ENTRY = 12, NO_ISA = -9 };

static uint64_t random_state;

static uint32_t number(uint32_t below)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    uint32_t high = (uint32_t)(random_state >> 33);
    return below == 0 ? high : high % below;
}

static uint8_t *copy(const uint8_t *from, long bytes)
{
    uint8_t *to = malloc((size_t)(bytes > 0 ? bytes : 1));
    if (to == NULL)
        abort();
    memcpy(to, from, (size_t)bytes);
    return to;
}

/* Values whose exponents are mostly few; some blocks with more than one group of tiles. */
static long make(uint8_t *data, int dtype, long most)
{
    const int width = dtype <= 2 ? 2 : 1;
    long values = number(3) == 0 ? most / width : 1 + number((uint32_t)(most / width / 40));
    const uint32_t spread = 1 + number(20), odd = 2 + number(300);
    for (long i = 0; i < values; i++) {
        uint32_t value = number(0) & 0x807f;
        uint32_t few = 100 + __builtin_ctz(number(0) | 1u << 15) % spread;
        value |= (number(odd) == 0 ? number(256) : few) << 7;
        if (dtype == 2)
            value = (value & 0x83ff) | (value >> 7 & 31) << 10;
        else if (dtype >= 3)
            value = value >> 6 & 0xff;
        memcpy(data + i * width, &value, (size_t)width);
    }
    return values * width;
}

/* Another block out of `block`: its length. `*changed`: whether it may no longer be accepted. */
static long damage(uint8_t *block, long bytes, uint32_t kind)
{
    const long head = HEAD + (block[5] == 1 ? TABLE : 0);
    const uint32_t places = 1 + number(4);
    if (kind == 0) {
        for (uint32_t i = 0; i < places; i++)
            block[number((uint32_t)bytes)] ^= (uint8_t)(1 << number(8));
    } else if (kind == 1) {
        bytes = number((uint32_t)bytes);
    } else if (kind == 2) {
        for (long at = number((uint32_t)bytes), end = at + number(200); at < end && at < bytes; at++)
            block[at] = (uint8_t)number(256);
    } else {
        const uint32_t decoded = *(pm_u32 *)(block + 8);
        const uint32_t width = block[6] <= 2 && block[6] > 0 ? 2 : 1;
        const uint32_t tiles = (decoded / width + PM_CODEC_TILE - 1) / PM_CODEC_TILE;
        long end = block[5] == 1 ? head + ENTRY * (long)tiles : HEAD + 4 * (long)((decoded + 65535) / 65536);
        if (block[5] == 1 && kind == 3) { /* move words and escapes about, with a length that fits */
            uint8_t *entry = block + head + ENTRY * number(tiles);
            const uint32_t cut = number(3) == 0 ? 4 * number(4) : 2 * number(3);
            pm_u32 *words = (pm_u32 *)entry, *escapes = (pm_u32 *)(entry + 4);
            if (*words >= cut / 2)
                *words -= cut / 2, *escapes += number(2) ? cut : 0;
            if (number(2) && bytes > end + 300)
                bytes -= 4 * (long)number(40);
            *(pm_u32 *)(block + 12) = (uint32_t)bytes;
        } else if (block[5] == 1 && kind == 4) { /* another table that sums up */
            pm_u16 *frequencies = (pm_u16 *)(block + HEAD + 16);
            uint32_t from = number(16), to = number(16);
            uint32_t some = frequencies[from] > 1 ? number(frequencies[from]) : 0;
            if (frequencies[to] > 0)
                frequencies[from] -= some, frequencies[to] += some;
            block[HEAD + number(16)] ^= (uint8_t)number(4);
        } else {
            for (uint32_t i = 0; i < places; i++)
                block[5 + number((uint32_t)end - 5)] = (uint8_t)number(256);
        }
        if (end + 4 <= bytes)
            *(pm_u32 *)(block + end) = pm_codec_portable.checksum(block, end);
    }
    return bytes;
}

int main(int argc, char **argv)
{
    static const char *isas[] = {"portable", "neon", "sse41", "avx2", "avx512"};
    enum { ISAS = sizeof isas / sizeof *isas };
    const long most = 2 * 5 * PM_CODEC_TILE + 2 * 77;
    long refused = 0, decoded = 0;
    if (argc != 3)
        return 2;
    random_state = strtoull(argv[1], NULL, 10);
    uint8_t *data = malloc((size_t)most), *out = malloc((size_t)pm_codec_bound(most));
    for (long round = atol(argv[2]); round > 0; round--) {
        const int dtype = (int)number(5);
        const long bytes = make(data, dtype, number(40) == 0 ? most : most / 10);
        uint8_t *given = copy(data, bytes);
        const long length = pm_codec_encode(isas[number(ISAS)], given, bytes, dtype, out, 1);
        const long coded =
            length > 0 ? length : pm_codec_encode("portable", given, bytes, dtype, out, 1);
        for (int i = 0; i < ISAS; i++)
            for (uint32_t kind = 0; kind < 7; kind++) {
                uint8_t *block = copy(out, coded);
                long left = coded;
                if (kind < 6)
                    left = damage(block, coded, kind);
                uint8_t *exact = copy(block, left), *result = malloc((size_t)bytes);
                const int code = kind % 2 == 0
                                     ? pm_codec_decode(isas[i], exact, left, result, bytes, 1)
                                     : pm_codec_decode_run(isas[i], exact, left, result, bytes);
                const int same = left == coded && memcmp(exact, out, (size_t)coded) == 0;
                const int right = code == 0 && memcmp(result, data, (size_t)bytes) == 0;
                refused += code < 0;
                decoded += code == 0;
                /* What a forger signed may be another way to write the same values. */
                const int fair = same ? right : kind <= 2 ? code != 0 : code != 0 || right;
                if (code != NO_ISA && !fair) {
                    fprintf(stderr, "%s: damage %u of %ld bytes of dtype %d, method %d: %d\n",
                            isas[i], kind, bytes, dtype, out[5], code);
                    return 1;
                }
                free(block), free(exact), free(result);
            }
        free(given);
    }
    free(data), free(out);
    printf("%ld refused, %ld decoded\n", refused, decoded);
    return 0;
}
