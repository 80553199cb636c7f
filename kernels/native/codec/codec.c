/* Blocks of losslessly coded values: headers, tables, and tiles handed to the pool.
 *
 * All memory is the caller's. Nothing of a block is trusted: its lengths are checked against each
 * other before any of it is followed.
 */
#include "codec.h"

#include <stdlib.h>

#include "../pool.h"

#define PM_API __attribute__((visibility("default")))

enum { RAW = 0, RANS = 1 };
enum { REASON_DTYPE = 1, REASON_SAVING = 2, REASON_EMPTY = 3 };
enum {
    HEADER = 16,
    TABLE = 48,
    CHECKSUM = 4,
    RAW_ENTRY = 4,
    TILE_ENTRY = 12,
    RAW_TILE = 65536,
    ESCAPE = 128,
    MIN_SAVING = 64,
    VERSION = 1,
    TYPES = 5,
};
static const long MAX_DECODED = 1L << 30;

/* Results below zero; kernels/codec/native.py has their words. */
enum {
    PM_CODEC_NO_MEMORY = -1,
    PM_CODEC_CUT_OFF = -2,
    PM_CODEC_UNKNOWN = -3,
    PM_CODEC_LENGTH = -4,
    PM_CODEC_HEADER = -5,
    PM_CODEC_SENSELESS = -6,
    PM_CODEC_OUT_LENGTH = -7,
    PM_CODEC_CONTENT = -8,
    PM_CODEC_NO_ISA = -9,
};

/* By the code of the dtype; 0 stands for bytes of any kind. */
static const pm_codec_type types[TYPES] = {{1, 0, 0}, {2, 8, 7}, {2, 5, 10}, {1, 4, 3}, {1, 5, 2}};

static long round4(long bytes) { return (bytes + 3) / 4 * 4; }
static long ceil_div(long a, long b) { return (a + b - 1) / b; }
static uint32_t get32(const uint8_t *at) { return *(const pm_u32 *)at; }
static void put32(uint8_t *at, uint32_t value) { *(pm_u32 *)at = value; }

static const pm_codec_kernels *find_kernels(const char *isa)
{
    const pm_codec_kernels *known[4];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        known[count++] = &pm_codec_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"))
        known[count++] = &pm_codec_avx2;
    if (__builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("popcnt"))
        known[count++] = &pm_codec_sse41;
#elif defined(__aarch64__) && defined(__ARM_NEON)
    known[count++] = &pm_codec_neon;
#endif
    known[count++] = &pm_codec_portable;
    for (int i = 0; i < count; i++)
        if (isa[0] == '\0' || strcmp(isa, known[i]->name) == 0)
            return known[i];
    return NULL;
}

/* The fastest instruction set of this processor that there is a codec for. */
PM_API const char *pm_codec_isa(void) { return find_kernels("")->name; }

/* Runs items 0..items-1 on `threads` threads, this one included. */
static int run(pm_task task, const void *job, long items, int threads)
{
    pm_pool *pool = NULL;
    if (threads > items)
        threads = (int)items;
    if (threads > 1 && (pool = pm_pool_new(threads)) == NULL)
        return PM_CODEC_NO_MEMORY;
    if (pool == NULL) {
        for (long item = 0; item < items; item++)
            task(job, item, NULL);
        return 0;
    }
    int result = pm_pool_run(pool, task, job, items, 0);
    pm_pool_free(pool);
    return result;
}

/* ---- encoding ---- */

typedef struct {
    const pm_codec_kernels *kernels;
    const pm_codec_encoder *encoder;
    pm_codec_type type;
    long values, tiles;
    const uint8_t *data;
    uint8_t *directory, *planes, *sections; /* of `out`; sections PM_CODEC_SECTION apart */
    uint64_t *counts;
    uint32_t *section_bytes;
} pm_encode_job;

static pm_codec_tile encode_tile_of(const pm_encode_job *job, long item)
{
    const long first = item * PM_CODEC_TILE, left = job->values - first;
    return (pm_codec_tile){job->type, job->values, first,
                           left < PM_CODEC_TILE ? left : PM_CODEC_TILE, job->planes,
                           (uint8_t *)job->data + first * job->type.bytes};
}

static void count_item(const void *raw, long item, void *scratch)
{
    const pm_encode_job *job = raw;
    const pm_codec_tile tile = encode_tile_of(job, item);
    uint32_t histogram[256] = {0};
    (void)scratch;
    job->kernels->count(&tile, histogram);
    for (int e = 0; e < 256; e++)
        if (histogram[e] > 0)
            __atomic_fetch_add(&job->counts[e], histogram[e], __ATOMIC_RELAXED);
}

static void encode_item(const void *raw, long item, void *scratch)
{
    const pm_encode_job *job = raw;
    const pm_codec_tile tile = encode_tile_of(job, item);
    uint8_t *entry = job->directory + item * TILE_ENTRY;
    uint32_t words, escapes;
    (void)scratch;
    job->section_bytes[item] = (uint32_t)job->kernels->encode(
        job->encoder, &tile, job->sections + item * PM_CODEC_SECTION, &words, &escapes);
    put32(entry, words);
    put32(entry + 4, escapes);
    put32(entry + 8, job->kernels->checksum(tile.data, tile.values * tile.type.bytes));
}

static void put_header(uint8_t *out, int method, int dtype, int detail, long decoded, long bytes)
{
    memcpy(out, "pmxc", 4);
    out[4] = VERSION;
    out[5] = (uint8_t)method;
    out[6] = (uint8_t)dtype;
    out[7] = (uint8_t)detail;
    put32(out + 8, (uint32_t)decoded);
    put32(out + 12, (uint32_t)bytes);
}

static long encode_raw(const pm_codec_kernels *kernels, const uint8_t *data, long bytes, int dtype,
                       int reason, uint8_t *out)
{
    const long head = HEADER + RAW_ENTRY * ceil_div(bytes, RAW_TILE);
    put_header(out, RAW, dtype, reason, bytes, head + CHECKSUM + bytes);
    for (long at = 0, entry = HEADER; at < bytes; at += RAW_TILE, entry += RAW_ENTRY) {
        const long size = bytes - at < RAW_TILE ? bytes - at : RAW_TILE;
        put32(out + entry, kernels->checksum(data + at, size));
    }
    put32(out + head, kernels->checksum(out, head));
    if (bytes > 0)
        memcpy(out + head + CHECKSUM, data, (size_t)bytes);
    return head + CHECKSUM + bytes;
}

/* The bytes of a coded block; 0 where it would be too long; or an error below 0. */
static long encode_rans(const pm_codec_kernels *kernels, const uint8_t *data, long bytes, int dtype,
                        uint8_t *out, int threads)
{
    const pm_codec_type type = types[dtype];
    const long values = bytes / type.bytes, tiles = ceil_div(values, PM_CODEC_TILE);
    const long head = HEADER + TABLE + TILE_ENTRY * tiles;
    uint64_t counts[256] = {0};
    pm_codec_encoder *encoder = malloc(sizeof *encoder);
    uint32_t *section_bytes = malloc((size_t)tiles * sizeof *section_bytes);
    pm_encode_job job = {kernels, encoder, type, values, tiles, data, out + HEADER + TABLE,
                         out + head + CHECKSUM, NULL, counts, section_bytes};
    long end = PM_CODEC_NO_MEMORY;
    if (encoder == NULL || section_bytes == NULL || run(count_item, &job, tiles, threads) != 0)
        goto done;
    pm_codec_choose_table(encoder, counts, (uint64_t)values);
    job.sections = job.planes + pm_codec_planes_bytes(type, values);
    memset(job.sections - 4, 0, 4);
    if (run(encode_item, &job, tiles, threads) != 0)
        goto done;
    uint8_t *at = job.sections;
    for (long tile = 0; tile < tiles; tile++) {
        memmove(at, job.sections + tile * PM_CODEC_SECTION, section_bytes[tile]);
        at += section_bytes[tile];
    }
    end = at - out;
    if (end > bytes - bytes / MIN_SAVING) {
        end = 0;
        goto done;
    }
    const pm_codec_table *table = &encoder->table;
    put_header(out, RANS, dtype, table->count + (table->has_escape ? ESCAPE : 0), bytes, end);
    memcpy(out + HEADER, table->exponents, PM_CODEC_SYMBOLS);
    memcpy(out + HEADER + PM_CODEC_SYMBOLS, table->frequencies, 2 * PM_CODEC_SYMBOLS);
    put32(out + head, kernels->checksum(out, head));
done:
    free(encoder);
    free(section_bytes);
    return end;
}

/* Room that pm_codec_encode wants for `bytes` bytes of data. */
PM_API long pm_codec_bound(long bytes)
{
    const long tiles = ceil_div(bytes, PM_CODEC_TILE);
    return HEADER + TABLE + CHECKSUM + bytes + 64 + tiles * (TILE_ENTRY + PM_CODEC_SECTION);
}

/* Encodes `bytes` bytes of whole values into `out`; the block's bytes, or an error below 0. */
PM_API long pm_codec_encode(const char *isa, const uint8_t *data, long bytes, int dtype,
                            uint8_t *out, int threads)
{
    const pm_codec_kernels *kernels = find_kernels(isa);
    if (kernels == NULL)
        return PM_CODEC_NO_ISA;
    if (dtype > 0 && bytes > 0) {
        const long end = encode_rans(kernels, data, bytes, dtype, out, threads);
        if (end != 0)
            return end;
    }
    const int reason = bytes == 0 ? REASON_EMPTY : dtype == 0 ? REASON_DTYPE : REASON_SAVING;
    return encode_raw(kernels, data, bytes, dtype, reason, out);
}

/* ---- decoding ---- */

static int check_table(const uint8_t *block, pm_codec_type type, pm_codec_table *table)
{
    int sum = 0, sound;
    memset(table, 0, sizeof *table);
    table->count = block[7] % ESCAPE;
    table->has_escape = block[7] >= ESCAPE;
    memcpy(table->exponents, block + HEADER, PM_CODEC_SYMBOLS);
    memcpy(table->frequencies, block + HEADER + PM_CODEC_SYMBOLS, 2 * PM_CODEC_SYMBOLS);
    sound = table->count >= 1 && table->count <= PM_CODEC_SYMBOLS;
    for (int s = 0; s < PM_CODEC_SYMBOLS; s++) {
        const int used = s < table->count;
        sum += table->frequencies[s];
        sound &= used == (table->frequencies[s] > 0) && table->exponents[s] >> type.exponent_bits == 0;
        sound &= (used && !(table->has_escape && s == table->count - 1)) || table->exponents[s] == 0;
    }
    return sound && sum == PM_CODEC_SLOTS;
}

/* Decoded bytes of a block whose header is sound, or an error below 0. `table` is filled where the
 * block is coded. */
static long check(const pm_codec_kernels *kernels, const uint8_t *block, long bytes,
                  pm_codec_table *table)
{
    if (bytes < HEADER + CHECKSUM)
        return PM_CODEC_CUT_OFF;
    if (memcmp(block, "pmxc", 4) != 0 || block[4] != VERSION || block[5] > RANS)
        return PM_CODEC_UNKNOWN;
    const int method = block[5], dtype = block[6], detail = block[7];
    const pm_codec_type type = types[dtype < TYPES ? dtype : 0];
    const long decoded = get32(block + 8), values = decoded / type.bytes;
    const long tiles = ceil_div(values, PM_CODEC_TILE);
    const long head = method == RAW ? HEADER + RAW_ENTRY * ceil_div(decoded, RAW_TILE)
                                    : HEADER + TABLE + TILE_ENTRY * tiles;
    if ((long)get32(block + 12) != bytes || bytes < head + CHECKSUM)
        return PM_CODEC_LENGTH;
    if (get32(block + head) != kernels->checksum(block, head))
        return PM_CODEC_HEADER;
    if (decoded > MAX_DECODED || decoded % type.bytes != 0 || dtype >= TYPES)
        return PM_CODEC_SENSELESS;
    if (method == RAW) {
        const int reasoned = detail >= REASON_DTYPE && detail <= REASON_EMPTY;
        return reasoned && bytes == head + CHECKSUM + decoded ? decoded : PM_CODEC_SENSELESS;
    }
    if (dtype == 0 || decoded == 0 || !check_table(block, type, table))
        return PM_CODEC_SENSELESS;
    long body = pm_codec_planes_bytes(type, values);
    for (long tile = 0; tile < tiles; tile++) {
        const uint8_t *entry = block + HEADER + TABLE + tile * TILE_ENTRY;
        const long left = values - tile * PM_CODEC_TILE;
        const long own = left < PM_CODEC_TILE ? left : PM_CODEC_TILE;
        const long words = get32(entry), escapes = get32(entry + 4);
        if (words > ceil_div(own, PM_CODEC_LANES) * PM_CODEC_LANES || escapes > own)
            return PM_CODEC_SENSELESS;
        body += round4(PM_CODEC_STATE_BYTES + 2 * words + escapes);
    }
    return bytes == head + CHECKSUM + body ? decoded : PM_CODEC_SENSELESS;
}

/* Decoded bytes of a block, or an error below 0. Reads the header alone. */
PM_API long pm_codec_check(const char *isa, const uint8_t *block, long bytes)
{
    const pm_codec_kernels *kernels = find_kernels(isa);
    pm_codec_table table;
    return kernels == NULL ? PM_CODEC_NO_ISA : check(kernels, block, bytes, &table);
}

typedef struct {
    const pm_codec_kernels *kernels;
    const pm_codec_decoder *decoder;
    pm_codec_type type;
    long values;
    const uint8_t *directory, *planes;
    const uint8_t **sections;
    uint8_t *out;
    int *damaged;
} pm_decode_job;

/* An item is as many tiles as the kernels like to decode at once. */
static void decode_item(const void *raw, long item, void *scratch)
{
    const pm_decode_job *job = raw;
    pm_codec_piece pieces[PM_CODEC_PIECES];
    const long tiles = ceil_div(job->values, PM_CODEC_TILE);
    long count = 0;
    (void)scratch;
    for (long tile = item * job->kernels->pieces; tile < tiles && count < job->kernels->pieces;
         tile++, count++) {
        const long first = tile * PM_CODEC_TILE, left = job->values - first;
        const uint8_t *entry = job->directory + tile * TILE_ENTRY;
        pieces[count] = (pm_codec_piece){
            {job->type, job->values, first, left < PM_CODEC_TILE ? left : PM_CODEC_TILE,
             (uint8_t *)job->planes, job->out + first * job->type.bytes},
            job->sections[tile], get32(entry), get32(entry + 4), get32(entry + 8)};
    }
    if (job->kernels->decode(job->decoder, pieces, count) != 0)
        __atomic_store_n(job->damaged, 1, __ATOMIC_RELAXED);
}

static int decode_raw(const pm_codec_kernels *kernels, const uint8_t *block, long decoded,
                      uint8_t *out)
{
    const uint8_t *data = block + HEADER + RAW_ENTRY * ceil_div(decoded, RAW_TILE) + CHECKSUM;
    for (long at = 0, entry = HEADER; at < decoded; at += RAW_TILE, entry += RAW_ENTRY) {
        const long size = decoded - at < RAW_TILE ? decoded - at : RAW_TILE;
        memcpy(out + at, data + at, (size_t)size);
        if (kernels->checksum(out + at, size) != get32(block + entry))
            return PM_CODEC_CONTENT;
    }
    return 0;
}

/* Decodes a block of `bytes` bytes into `out`; 0, or an error below 0, after which `out` holds
 * anything. */
PM_API int pm_codec_decode(const char *isa, const uint8_t *block, long bytes, uint8_t *out,
                           long out_bytes, int threads)
{
    const pm_codec_kernels *kernels = find_kernels(isa);
    pm_codec_decoder decoder;
    if (kernels == NULL)
        return PM_CODEC_NO_ISA;
    const long decoded = check(kernels, block, bytes, &decoder.table);
    if (decoded < 0)
        return (int)decoded;
    if (decoded != out_bytes)
        return PM_CODEC_OUT_LENGTH;
    if (block[5] == RAW)
        return decode_raw(kernels, block, decoded, out);
    const pm_codec_type type = types[block[6]];
    const long values = decoded / type.bytes, tiles = ceil_div(values, PM_CODEC_TILE);
    const uint8_t *directory = block + HEADER + TABLE;
    const uint8_t *planes = directory + tiles * TILE_ENTRY + CHECKSUM, *at = planes;
    const uint8_t **sections = malloc((size_t)tiles * sizeof *sections);
    int damaged = 0;
    if (sections == NULL)
        return PM_CODEC_NO_MEMORY;
    for (int width = 8; width > 0; width /= 2)
        if ((type.mantissa_bits + 1) & width)
            at += (values * width + 7) / 8;
    for (; at < planes + pm_codec_planes_bytes(type, values); at++)
        damaged |= *at != 0;
    for (long tile = 0; tile < tiles; tile++) {
        const uint8_t *entry = directory + tile * TILE_ENTRY;
        sections[tile] = at;
        at += round4(PM_CODEC_STATE_BYTES + 2 * (long)get32(entry) + get32(entry + 4));
    }
    pm_codec_place_slots(&decoder.table);
    if (kernels->by_slot)
        pm_codec_fill_decoder(&decoder);
    pm_decode_job job = {kernels, &decoder, type, values, directory, planes, sections, out,
                         &damaged};
    const int result = run(decode_item, &job, ceil_div(tiles, kernels->pieces), threads);
    free(sections);
    return result != 0 ? PM_CODEC_NO_MEMORY : damaged ? PM_CODEC_CONTENT : 0;
}
