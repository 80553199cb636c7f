/* Writes blocks: their table, their tiles on the pool, their header. All memory is the caller's. */
#include <stdlib.h>

#include "codec_block.h"

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
    if (encoder == NULL || section_bytes == NULL || pm_codec_spread(count_item, &job, tiles, threads) != 0)
        goto done;
    pm_codec_choose_table(encoder, counts, (uint64_t)values);
    job.sections = job.planes + pm_codec_planes_bytes(type, values);
    memset(job.sections - 4, 0, 4);
    if (pm_codec_spread(encode_item, &job, tiles, threads) != 0)
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
    const pm_codec_kernels *kernels = pm_codec_find(isa);
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
