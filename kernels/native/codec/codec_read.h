/* Reading blocks one after the other, in portions that stay in a near cache until they are used. */
#ifndef PM_CODEC_READ_H
#define PM_CODEC_READ_H

#include "codec.h"

/* A block being read, in order. Nothing of it is trusted: its lengths are checked against each other
 * when it is opened, before any of it is followed. */
typedef struct {
    const pm_codec_kernels *kernels;
    pm_codec_decoder decoder; /* of a coded block */
    pm_codec_type type;
    int dtype, coded;
    long decoded, done;         /* bytes of all values, and of those read */
    const uint8_t *directory;   /* from the next tile on */
    const uint8_t *content;     /* planes; what is left of the values where they are raw */
    const uint8_t *section;     /* of the next tile */
} pm_codec_reader;

/* Blocks back to back that fill `out`; what comes after them does not count. */
typedef struct {
    const uint8_t *stored, *end;
    uint8_t *out, *out_end; /* of what is not there yet */
    pm_codec_reader reader;
} pm_codec_run;

/* Before the first block. */
void pm_codec_begin(pm_codec_run *run, const pm_codec_kernels *kernels, const uint8_t *stored,
                    long bytes, uint8_t *out, long out_bytes);

/* Decodes some tiles more to `run->out`, and moves that: their bytes (256 KiB at most), 0 where all is
 * there, or an error below 0. */
long pm_codec_read(pm_codec_run *run);

/* Adds to `counts`, by exponent, how many of the bfloat16 in [begin, end) of the bytes of `run` the
 * tables of their blocks promise, times PM_CODEC_SLOTS; what is raw, escaped or no sound block is left
 * out. `run` has just begun. */
void pm_codec_promised(const pm_codec_run *run, long begin, long end, long counts[256]);

#endif
