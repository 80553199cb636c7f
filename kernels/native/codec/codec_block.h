/* What writing and reading blocks share: the header's numbers, and who does the work. */
#ifndef PM_CODEC_BLOCK_H
#define PM_CODEC_BLOCK_H

#include "../pool.h"
#include "codec.h"

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
    BFLOAT16 = 1, /* a code of a dtype */
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
    PM_CODEC_OTHER_RUN = -10,
};

/* By the code of the dtype; 0 stands for bytes of any kind. */
static const pm_codec_type types[TYPES] = {{1, 0, 0}, {2, 8, 7}, {2, 5, 10}, {1, 4, 3}, {1, 5, 2}};

static inline long round4(long bytes) { return (bytes + 3) / 4 * 4; }
static inline long ceil_div(long a, long b) { return (a + b - 1) / b; }
static inline uint32_t get32(const uint8_t *at) { return *(const pm_u32 *)at; }
static inline void put32(uint8_t *at, uint32_t value) { *(pm_u32 *)at = value; }

/* Runs items 0..items-1 on `threads` threads, this one included; 0, or an error. */
int pm_codec_spread(pm_task task, const void *job, long items, int threads);

#endif
