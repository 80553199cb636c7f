/* For each set of eight lanes, which of the next words each lane takes if those of the set take them
 * in order: indices of bytes for a shuffle, 0x80 (which shows as 0) where a lane takes none. And the
 * other way round: which lanes' words are the last ones of eight if those of the set give theirs. */
#ifndef PM_CODEC_TAKES_H
#define PM_CODEC_TAKES_H

#include <stdint.h>

#define PM_WORD(m, j) (2 * __builtin_popcount((m) & ((1 << (j)) - 1)))
#define PM_LANE(m, j)                                                                              \
    (m) >> (j) & 1 ? PM_WORD(m, j) : 0x80, (m) >> (j) & 1 ? PM_WORD(m, j) + 1 : 0x80
#define PM_SET(m)                                                                                  \
    {PM_LANE(m, 0), PM_LANE(m, 1), PM_LANE(m, 2), PM_LANE(m, 3),                                   \
     PM_LANE(m, 4), PM_LANE(m, 5), PM_LANE(m, 6), PM_LANE(m, 7)}
/* Where word n of the set comes from, as the index of its lower byte; 0 for n < 0. */
#define PM_IF_NTH(m, n, j) ((m) >> (j) & 1 && PM_WORD(m, j) == 2 * (n) ? 2 * (j) : 0)
#define PM_NTH(m, n)                                                                               \
    (PM_IF_NTH(m, n, 0) + PM_IF_NTH(m, n, 1) + PM_IF_NTH(m, n, 2) + PM_IF_NTH(m, n, 3) +           \
     PM_IF_NTH(m, n, 4) + PM_IF_NTH(m, n, 5) + PM_IF_NTH(m, n, 6) + PM_IF_NTH(m, n, 7))
#define PM_LAST(m, j)                                                                              \
    PM_NTH(m, (j) - 8 + __builtin_popcount(m)), PM_NTH(m, (j) - 8 + __builtin_popcount(m)) + 1
#define PM_GIVEN(m)                                                                                \
    {PM_LAST(m, 0), PM_LAST(m, 1), PM_LAST(m, 2), PM_LAST(m, 3),                                   \
     PM_LAST(m, 4), PM_LAST(m, 5), PM_LAST(m, 6), PM_LAST(m, 7)}

#define PM_SETS4(of, m) of(m), of((m) + 1), of((m) + 2), of((m) + 3)
#define PM_SETS16(of, m)                                                                           \
    PM_SETS4(of, m), PM_SETS4(of, (m) + 4), PM_SETS4(of, (m) + 8), PM_SETS4(of, (m) + 12)
#define PM_SETS64(of, m)                                                                           \
    PM_SETS16(of, m), PM_SETS16(of, (m) + 16), PM_SETS16(of, (m) + 32), PM_SETS16(of, (m) + 48)
#define PM_SETS(of) PM_SETS64(of, 0), PM_SETS64(of, 64), PM_SETS64(of, 128), PM_SETS64(of, 192)

static const uint8_t takes[256][16] = {PM_SETS(PM_SET)};
static const uint8_t gives[256][16] = {PM_SETS(PM_GIVEN)};

#endif
