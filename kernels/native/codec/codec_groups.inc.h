/* What codec_bytes.inc.h wants of an instruction set with vectors of 16 bytes, of which two make a
 * row. The including file has `set_of`: a bit for each of the eight even and then eight odd lanes of
 * a group that take words. */
#include "codec_takes.h"

PM_TARGET PM_INLINE void put_pair(uint8_t *out, vb low, vb high)
{
    memcpy(out, &low, sizeof low);
    memcpy(out + sizeof low, &high, sizeof high);
}

PM_TARGET PM_INLINE vb broadcast(const uint8_t *at) { return bytes_at(at); }

PM_TARGET PM_INLINE void take_eight(vw *low, vw which, uint32_t set, const uint8_t **words)
{
    const vb fresh = look_up(bytes_at(*words), bytes_at(takes[set]));
    *low = (vw)choose((vb)which, fresh, (vb)*low);
    *words += 2 * (size_t)(unsigned)__builtin_popcount(set);
}

PM_TARGET PM_INLINE void take_words(lane_states *lanes, const vw *even, const vw *odd,
                                    const uint8_t **words)
{
    lane_group *first = &lanes->groups[0], *second = &lanes->groups[1];
    const uint32_t sets[2] = {set_of(even[0], odd[0]), set_of(even[1], odd[1])};
    take_eight(&first->even_low, even[0], sets[0] & 255, words);
    take_eight(&second->even_low, even[1], sets[1] & 255, words);
    take_eight(&first->odd_low, odd[0], sets[0] >> 8, words);
    take_eight(&second->odd_low, odd[1], sets[1] >> 8, words);
}
