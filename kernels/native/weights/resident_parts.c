/* Parts of matrices to the resident form as they arrive, as values or as coded blocks. */
#include <pthread.h>

#include "../codec/codec_read.h"
#include "../forward/phases.h"

/* A palette that the first part of a matrix chooses for all. */
typedef struct {
    int chosen;
    uint8_t exponents[PM_PALETTE];
} pm_palette;

/* A part that arrived of a matrix, and the matrix's palette. */
typedef struct {
    pm_pack_part part;
    pm_palette *palette;
    long escapes; /* of the part; result */
} pm_pack_arrival;

static pthread_mutex_t choosing = PTHREAD_MUTEX_INITIALIZER;

/* Packs rows [from, to) of an arrival, whose first one begins a tile. Its keys follow the `total` that
 * there are; returns how many there are then. */
static long pack_rows(const pm_kernels *kernels, pm_pack_arrival *arrival, long from, long to,
                      uint64_t *keys, long total, long room)
{
    pm_pack_part part = arrival->part;
    part.rows += from * part.ld;
    part.N = to - from;
    part.tiles += from / PM_TILE_ROWS * part.tile_bytes;
    part.tile += from / PM_TILE_ROWS;
    part.palette = arrival->palette->exponents;
    part.keys = keys + pm_min(total, room);
    part.room = room - pm_min(total, room);
    const long escapes = kernels->pack(&part);
    arrival->escapes += escapes;
    return total + escapes;
}

/* Packs `count` parts on this thread; any number of threads may do so. Their keys follow each other.
 * Returns how many there are: where that is more than `room`, do it again with so much. */
PM_API long pm_resident_pack_parts(const pm_kernels *kernels, pm_pack_arrival *arrivals, long count,
                                   long sample, uint64_t *keys, long room)
{
    long total = 0;
    for (pm_pack_arrival *arrival = arrivals; arrival < arrivals + count; arrival++) {
        const pm_pack_part *part = &arrival->part;
        pthread_mutex_lock(&choosing);
        if (!arrival->palette->chosen)
            pm_choose_palette(part->rows, part->N, part->K, part->ld, sample,
                              arrival->palette->exponents);
        arrival->palette->chosen = 1;
        pthread_mutex_unlock(&choosing);
        arrival->escapes = 0;
        total = pack_rows(kernels, arrival, 0, part->N, keys, total, room);
    }
    return total;
}

/* The palette for what the tables of blocks promise; 0 where they say nothing. What they do not name is
 * rare, and mostly small: the nearest below the most frequent one comes first. */
static int choose_by_promise(long counts[256], uint8_t palette[PM_PALETTE])
{
    int most = 0;
    for (int e = 0; e < 256; e++)
        if (counts[e] > counts[most])
            most = e;
    if (counts[most] == 0)
        return 0;
    for (int e = 0; e < 256; e++)
        if (counts[e] == 0)
            counts[e] = e < most ? e - most : -256;
    pm_palette_by(counts, palette);
    return 1;
}

/* Palettes of arrivals that have none yet, by the tables of the blocks that they come in; whether all
 * have one then. */
static int choose_palettes(const pm_codec_run *run, const pm_pack_arrival *arrivals, long count)
{
    int chosen = 1;
    for (const pm_pack_arrival *arrival = arrivals; arrival < arrivals + count; arrival++) {
        const pm_pack_part *part = &arrival->part;
        const long begin = (const uint8_t *)part->rows - run->out;
        long counts[256] = {0};
        pthread_mutex_lock(&choosing);
        if (!arrival->palette->chosen) {
            pm_codec_promised(run, begin, begin + 2 * part->N * part->ld, counts);
            arrival->palette->chosen = choose_by_promise(counts, arrival->palette->exponents);
        }
        chosen &= arrival->palette->chosen;
        pthread_mutex_unlock(&choosing);
    }
    return chosen;
}

/* Decodes blocks back to back into `chunk`, which they fill, and packs `count` arrivals that lie in it in
 * order, without gaps between their rows. What was decoded is packed while it is in a near cache: at once,
 * tile by tile. Returns as pm_resident_pack_parts does, which may be used where the room does not suffice,
 * or an error of the codec below 0. */
PM_API long pm_resident_decode_parts(const pm_kernels *kernels, const uint8_t *stored, long bytes,
                                     uint8_t *chunk, long chunk_bytes, pm_pack_arrival *arrivals,
                                     long count, long sample, uint64_t *keys, long room)
{
    pm_codec_run run;
    long total = 0, number = 0, done = 0, read;
    pm_codec_begin(&run, pm_codec_find(""), stored, bytes, chunk, chunk_bytes);
    const int chosen = choose_palettes(&run, arrivals, count);
    for (long i = 0; i < count; i++)
        arrivals[i].escapes = 0;
    while ((read = pm_codec_read(&run)) > 0)
        while (chosen && number < count) {
            const pm_pack_part *part = &arrivals[number].part;
            const long there = (run.out - (const uint8_t *)part->rows) / (2 * part->ld);
            const long end = there < part->N ? there / PM_TILE_ROWS * PM_TILE_ROWS : part->N;
            if (end > done)
                total = pack_rows(kernels, &arrivals[number], done, end, keys, total, room);
            done = pm_max(done, end);
            if (done < part->N)
                break;
            number++;
            done = 0;
        }
    if (read < 0)
        return read;
    return chosen ? total : pm_resident_pack_parts(kernels, arrivals, count, sample, keys, room);
}
