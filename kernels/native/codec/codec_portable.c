/* The codec for any processor. */
#define PM_TARGET
#include "codec_tile.inc.h"

const pm_codec_kernels pm_codec_portable = {
    .name = "portable",
    .pieces = 1,
    .by_slot = 1,
    .checksum = checksum,
    .count = count_exponents,
    .encode = encode_tile,
    .decode = decode_tiles,
};
