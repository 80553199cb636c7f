/* For each set of eight lanes, which of the next words each lane takes if those of the set take them
 * in order: indices of bytes for a shuffle, 0x80 (which shows as 0) where a lane takes none. */
#ifndef PM_CODEC_TAKES_H
#define PM_CODEC_TAKES_H

#include <stdint.h>

#define PM_WORD(m, j) (2 * __builtin_popcount((m) & ((1 << (j)) - 1)))
#define PM_LANE(m, j)                                                                              \
    (m) >> (j) & 1 ? PM_WORD(m, j) : 0x80, (m) >> (j) & 1 ? PM_WORD(m, j) + 1 : 0x80
#define PM_SET(m)                                                                                  \
    {PM_LANE(m, 0), PM_LANE(m, 1), PM_LANE(m, 2), PM_LANE(m, 3),                                   \
     PM_LANE(m, 4), PM_LANE(m, 5), PM_LANE(m, 6), PM_LANE(m, 7)}
#define PM_SETS4(m) PM_SET(m), PM_SET((m) + 1), PM_SET((m) + 2), PM_SET((m) + 3)
#define PM_SETS16(m) PM_SETS4(m), PM_SETS4((m) + 4), PM_SETS4((m) + 8), PM_SETS4((m) + 12)
#define PM_SETS64(m) PM_SETS16(m), PM_SETS16((m) + 16), PM_SETS16((m) + 32), PM_SETS16((m) + 48)

static const uint8_t takes[256][16] = {PM_SETS64(0), PM_SETS64(64), PM_SETS64(128), PM_SETS64(192)};

#endif
