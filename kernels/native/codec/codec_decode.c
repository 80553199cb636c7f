/* Reads blocks: their header, then their tiles, in order or on the pool. All memory is the caller's.
 * Nothing of a block is trusted: its lengths are checked against each other before any of it is
 * followed. */
#include <stdlib.h>

#include "codec_block.h"
#include "codec_read.h"

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
    const pm_codec_kernels *kernels = pm_codec_find(isa);
    pm_codec_table table;
    return kernels == NULL ? PM_CODEC_NO_ISA : check(kernels, block, bytes, &table);
}

/* Zeros fill up the planes of a block; where they end, or NULL. */
static const uint8_t *end_of_planes(const uint8_t *planes, pm_codec_type type, long values)
{
    const uint8_t *at = planes, *end = planes + pm_codec_planes_bytes(type, values);
    for (int width = 8; width > 0; width /= 2)
        if ((type.mantissa_bits + 1) & width)
            at += (values * width + 7) / 8;
    for (; at < end; at++)
        if (*at != 0)
            return NULL;
    return end;
}

/* Begins to read a block of `bytes` bytes; its decoded bytes, or an error below 0. */
static long open_block(pm_codec_reader *reader, const uint8_t *block, long bytes)
{
    const long decoded = check(reader->kernels, block, bytes, &reader->decoder.table);
    if (decoded < 0)
        return decoded;
    reader->dtype = block[6];
    reader->type = types[reader->dtype];
    reader->coded = block[5] == RANS;
    reader->decoded = decoded;
    reader->done = 0;
    if (!reader->coded) {
        reader->directory = block + HEADER;
        reader->content = reader->directory + RAW_ENTRY * ceil_div(decoded, RAW_TILE) + CHECKSUM;
        return decoded;
    }
    const long values = decoded / reader->type.bytes, tiles = ceil_div(values, PM_CODEC_TILE);
    reader->directory = block + HEADER + TABLE;
    reader->content = reader->directory + tiles * TILE_ENTRY + CHECKSUM;
    reader->section = end_of_planes(reader->content, reader->type, values);
    if (reader->section == NULL)
        return PM_CODEC_CONTENT;
    pm_codec_place_slots(&reader->decoder.table);
    if (reader->kernels->by_slot)
        pm_codec_fill_decoder(&reader->decoder);
    return decoded;
}

/* One tile of a raw block to `out`; 0, or -1 where it is damaged. */
static int read_raw_tile(const pm_codec_reader *reader, const uint8_t *entry, const uint8_t *data,
                         long bytes, uint8_t *out)
{
    memcpy(out, data, (size_t)bytes);
    return reader->kernels->checksum(out, bytes) == get32(entry) ? 0 : -1;
}

static long section_bytes(const uint8_t *entry)
{
    return round4(PM_CODEC_STATE_BYTES + 2 * (long)get32(entry) + get32(entry + 4));
}

/* Tile `tile` of a coded block, which is to come to `out`. */
static pm_codec_piece piece_of(const pm_codec_reader *reader, long tile, const uint8_t *entry,
                               const uint8_t *section, uint8_t *out)
{
    const long values = reader->decoded / reader->type.bytes;
    const long first = tile * PM_CODEC_TILE, left = values - first;
    return (pm_codec_piece){{reader->type, values, first, left < PM_CODEC_TILE ? left : PM_CODEC_TILE,
                             (uint8_t *)reader->content, out},
                            section, get32(entry), get32(entry + 4), get32(entry + 8)};
}

/* The next tiles of a block, as many as are best decoded at once; their bytes, or an error. */
static long read_tiles(pm_codec_reader *reader, uint8_t *out)
{
    const long begin = reader->done;
    int result = 0;
    if (!reader->coded) {
        for (int i = 0; i < PM_CODEC_PIECES && reader->done < reader->decoded; i++) {
            const long left = reader->decoded - reader->done;
            const long bytes = left < RAW_TILE ? left : RAW_TILE;
            result |= read_raw_tile(reader, reader->directory, reader->content, bytes,
                                    out + reader->done - begin);
            reader->directory += RAW_ENTRY;
            reader->content += bytes;
            reader->done += bytes;
        }
    } else {
        pm_codec_piece pieces[PM_CODEC_PIECES];
        const long tile_bytes = PM_CODEC_TILE * reader->type.bytes;
        long count = 0;
        for (; count < reader->kernels->pieces && reader->done < reader->decoded; count++) {
            pieces[count] = piece_of(reader, reader->done / tile_bytes, reader->directory,
                                     reader->section, out + reader->done - begin);
            reader->section += section_bytes(reader->directory);
            reader->directory += TILE_ENTRY;
            reader->done += pieces[count].tile.values * reader->type.bytes;
        }
        result = reader->kernels->decode(&reader->decoder, pieces, count);
    }
    return result != 0 ? PM_CODEC_CONTENT : reader->done - begin;
}

/* ---- one block, on several threads ---- */

typedef struct {
    const pm_codec_reader *reader;
    const uint8_t **sections;
    uint8_t *out;
    int *damaged;
} pm_decode_job;

/* An item is as many tiles as the kernels like to decode at once. */
static void decode_item(const void *raw, long item, void *scratch)
{
    const pm_decode_job *job = raw;
    const pm_codec_reader *reader = job->reader;
    const long tile_bytes = PM_CODEC_TILE * reader->type.bytes;
    const long tiles = ceil_div(reader->decoded, tile_bytes);
    pm_codec_piece pieces[PM_CODEC_PIECES];
    long count = 0;
    (void)scratch;
    for (long tile = item * reader->kernels->pieces;
         tile < tiles && count < reader->kernels->pieces; tile++, count++)
        pieces[count] = piece_of(reader, tile, reader->directory + tile * TILE_ENTRY,
                                 job->sections[tile], job->out + tile * tile_bytes);
    if (reader->kernels->decode(&reader->decoder, pieces, count) != 0)
        __atomic_store_n(job->damaged, 1, __ATOMIC_RELAXED);
}

static int decode_tiles_on(const pm_codec_reader *reader, uint8_t *out, int threads)
{
    const long tiles = ceil_div(reader->decoded, PM_CODEC_TILE * reader->type.bytes);
    const uint8_t **sections = malloc((size_t)tiles * sizeof *sections);
    const uint8_t *at = reader->section;
    int damaged = 0;
    if (sections == NULL)
        return PM_CODEC_NO_MEMORY;
    for (long tile = 0; tile < tiles; tile++) {
        sections[tile] = at;
        at += section_bytes(reader->directory + tile * TILE_ENTRY);
    }
    const pm_decode_job job = {reader, sections, out, &damaged};
    const int result =
        pm_codec_spread(decode_item, &job, ceil_div(tiles, reader->kernels->pieces), threads);
    free(sections);
    return result != 0 ? PM_CODEC_NO_MEMORY : damaged ? PM_CODEC_CONTENT : 0;
}

/* Decodes a block of `bytes` bytes into `out`; 0, or an error below 0, after which `out` holds
 * anything. */
PM_API int pm_codec_decode(const char *isa, const uint8_t *block, long bytes, uint8_t *out,
                           long out_bytes, int threads)
{
    pm_codec_reader reader; /* opened below: its tables are long */
    reader.kernels = pm_codec_find(isa);
    if (reader.kernels == NULL)
        return PM_CODEC_NO_ISA;
    const long decoded = open_block(&reader, block, bytes);
    if (decoded < 0)
        return (int)decoded;
    if (decoded != out_bytes)
        return PM_CODEC_OUT_LENGTH;
    if (threads > 1 && reader.coded)
        return decode_tiles_on(&reader, out, threads);
    for (long read; reader.done < reader.decoded; out += read)
        if ((read = read_tiles(&reader, out)) < 0)
            return (int)read;
    return 0;
}

/* ---- blocks back to back ---- */

void pm_codec_begin(pm_codec_run *run, const pm_codec_kernels *kernels, const uint8_t *stored,
                    long bytes, uint8_t *out, long out_bytes)
{
    run->stored = stored;
    run->end = stored + bytes;
    run->out = out;
    run->out_end = out + out_bytes;
    run->reader.kernels = kernels;
    run->reader.done = run->reader.decoded = 0;
}

/* Opens the next block of `left` bytes at most, which decodes to `room` at most; its length, or an
 * error below 0. */
static long open_next(pm_codec_reader *reader, const uint8_t *stored, long left, long room)
{
    if (left < HEADER)
        return PM_CODEC_CUT_OFF;
    const long length = get32(stored + 12);
    const long decoded = open_block(reader, stored, length < left ? length : left);
    if (decoded < 0)
        return decoded;
    return decoded > 0 && decoded <= room ? length : PM_CODEC_OTHER_RUN;
}

long pm_codec_read(pm_codec_run *run)
{
    if (run->out == run->out_end)
        return 0;
    if (run->reader.done == run->reader.decoded) {
        const long length = open_next(&run->reader, run->stored, run->end - run->stored,
                                      run->out_end - run->out);
        if (length < 0)
            return length;
        run->stored += length;
    }
    const long bytes = read_tiles(&run->reader, run->out);
    if (bytes > 0)
        run->out += bytes;
    return bytes;
}

/* Decodes blocks back to back into `out`, which they fill; 0, or an error below 0. */
PM_API int pm_codec_decode_run(const char *isa, const uint8_t *stored, long bytes, uint8_t *out,
                               long out_bytes)
{
    const pm_codec_kernels *kernels = pm_codec_find(isa);
    pm_codec_run run;
    long read;
    if (kernels == NULL)
        return PM_CODEC_NO_ISA;
    pm_codec_begin(&run, kernels, stored, bytes, out, out_bytes);
    while ((read = pm_codec_read(&run)) > 0)
        ;
    return (int)read;
}

void pm_codec_promised(const pm_codec_run *run, long begin, long end, long counts[256])
{
    pm_codec_reader reader;
    reader.kernels = run->reader.kernels;
    const long size = run->out_end - run->out;
    const uint8_t *stored = run->stored;
    for (long at = 0, length; at < size && at < end; at += reader.decoded, stored += length) {
        length = open_next(&reader, stored, run->end - stored, size - at);
        if (length < 0)
            return;
        const pm_codec_table *table = &reader.decoder.table;
        const long from = begin > at ? begin : at;
        const long to = end < at + reader.decoded ? end : at + reader.decoded;
        if (!reader.coded || reader.dtype != BFLOAT16 || to <= from)
            continue;
        for (int s = 0; s < table->count - table->has_escape; s++)
            counts[table->exponents[s]] += table->frequencies[s] * ((to - from) / 2);
    }
}
