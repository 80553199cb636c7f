/* Decoding with vectors of 16 or 32 bytes and no gathers: all tables have 16 entries of a byte, so
 * that a look-up is one shuffle. The including file has, beforehand:
 *   VECTOR      bytes of a vector: 16 or 32
 *   look_up     bytes of a table, by index (< 16); both halves of a longer vector hold the table
 *   choose      by the bits of a mask, of two vectors
 *   times_high  upper halves of products of words
 *   top_bits    the highest bit of each byte
 *   zip_low, zip_high, put_pair, widen, broadcast
 *               see codec_avx2.c
 * and defines take_words afterwards.
 *
 * A state is two words, in vectors of upper and lower ones. Lanes 0..15 are `even`, as their values
 * have even positions, 16..31 `odd`; one byte of a lane is the lower half of a word in the vector of
 * even lanes, the upper half for odd lanes, so that a vector of bytes has values in their order.
 * With f for frequency and x = 65536 high + low, a step is
 *
 *     f (x div 4096) + offset = 16 f high + (f (low div 4096) + offset)
 *
 * whose last bracket is a word, so that two products of words, one of them with its upper half, and
 * one carry do it.
 */
#define PM_CODEC_OWN_DECODE
#define PM_CODEC_OWN_SYMBOLS
#include "codec_tile.inc.h"

enum { GROUPS = PM_CODEC_LANES / VECTOR };

typedef uint8_t vb __attribute__((vector_size(VECTOR)));
typedef uint16_t vw __attribute__((vector_size(VECTOR)));
typedef uint32_t vd __attribute__((vector_size(VECTOR)));
typedef uint64_t vq __attribute__((vector_size(VECTOR)));

PM_TARGET PM_INLINE vb look_up(vb table, vb index);
PM_TARGET PM_INLINE vb choose(vb mask, vb yes, vb no);
PM_TARGET PM_INLINE vw times_high(vw a, vw b);
PM_TARGET PM_INLINE uint32_t top_bits(vb x);
/* Bytes of the first halves of `a` and `b` in turn, and of the second ones; in each 16 bytes. */
PM_TARGET PM_INLINE vb zip_low(vb a, vb b);
PM_TARGET PM_INLINE vb zip_high(vb a, vb b);
/* Writes what zip_low and zip_high made, in order. */
PM_TARGET PM_INLINE void put_pair(uint8_t *out, vb low, vb high);
/* Words from the bytes at `at`. */
PM_TARGET PM_INLINE vw widen(const uint8_t *at);
/* 16 bytes, in each 16. */
PM_TARGET PM_INLINE vb broadcast(const uint8_t *at);

PM_TARGET PM_INLINE vb bytes_at(const uint8_t *at)
{
    vb x;
    memcpy(&x, at, sizeof x);
    return x;
}

/* By bucket: its alias, how many of its slots are its own, what is added to a slot to get its
 * offset (own, alias's), lower and upper byte. By symbol: frequency - 4096, likewise; the exponent
 * where it goes in a value's upper byte, or the mark of the escape, and in its lower byte. */
typedef struct {
    vb other, bound, own[2], alias[2], factor[2], shown[2];
    int is_constant; /* one symbol has all slots: states stay as they are */
} decode_tables;

typedef struct {
    vw even_high, even_low, odd_high, odd_low;
} lane_group;

typedef struct {
    lane_group groups[GROUPS];
} lane_states;

/* Lanes of the checksum as the values' bytes lie in vectors when they are zipped. */
typedef struct {
    vd low[GROUPS], high[GROUPS];
} hash_lanes;

PM_TARGET PM_INLINE lane_states load_lanes(const uint8_t *section)
{
    uint16_t low[PM_CODEC_LANES], high[PM_CODEC_LANES];
    lane_states lanes;
    for (int lane = 0; lane < PM_CODEC_LANES; lane++) {
        low[lane] = ((const pm_u16 *)section)[2 * lane];
        high[lane] = ((const pm_u16 *)section)[2 * lane + 1];
    }
    for (int g = 0; g < GROUPS; g++) {
        const int even = g * VECTOR / 2, odd = PM_CODEC_LANES / 2 + even;
        memcpy(&lanes.groups[g].even_low, low + even, VECTOR);
        memcpy(&lanes.groups[g].even_high, high + even, VECTOR);
        memcpy(&lanes.groups[g].odd_low, low + odd, VECTOR);
        memcpy(&lanes.groups[g].odd_high, high + odd, VECTOR);
    }
    return lanes;
}

PM_TARGET PM_INLINE int at_rest(lane_states lanes)
{
    vw wrong = {0};
    for (int g = 0; g < GROUPS; g++) {
        const lane_group *group = &lanes.groups[g];
        wrong |= (group->even_high ^ 1) | group->even_low | (group->odd_high ^ 1) | group->odd_low;
    }
    return top_bits((vb)(wrong == 0)) == (uint32_t)(0xffffffffull >> (32 - VECTOR));
}

/* Piece p of 16 bytes of a row's hash lanes: 8 p .. 8 p + 3 are in `low`, the next in `high`. */
PM_TARGET PM_INLINE hash_lanes load_hash(const uint32_t *lanes)
{
    hash_lanes hash;
    for (int p = 0; p < PM_CODEC_LANES / 16; p++) {
        memcpy((uint8_t *)hash.low + 16 * p, lanes + 8 * p, 16);
        memcpy((uint8_t *)hash.high + 16 * p, lanes + 8 * p + 4, 16);
    }
    return hash;
}

PM_TARGET PM_INLINE void store_hash(uint32_t *lanes, hash_lanes hash)
{
    for (int p = 0; p < PM_CODEC_LANES / 16; p++) {
        memcpy(lanes + 8 * p, (uint8_t *)hash.low + 16 * p, 16);
        memcpy(lanes + 8 * p + 4, (uint8_t *)hash.high + 16 * p, 16);
    }
}

#include "codec_flight.inc.h"

/* Each lane of `even` and `odd` whose bits are set takes the next word as the lower one of its state;
 * moves `*words`. */
PM_TARGET PM_INLINE void take_words(lane_states *lanes, const vw *even, const vw *odd,
                                    const uint8_t **words);

PM_TARGET PM_INLINE void put_entry(uint8_t (*tables)[16], int at, uint32_t value)
{
    tables[0][at] = (uint8_t)value;
    tables[1][at] = (uint8_t)(value >> 8);
}

PM_TARGET PM_INLINE decode_tables load_tables(const pm_codec_table *table, int type)
{
    uint8_t other[16], bound[16], own[2][16], alias[2][16], factor[2][16], shown[2][16];
    for (int b = 0; b < PM_CODEC_SYMBOLS; b++) {
        const uint32_t size = table->limit[b] - (uint32_t)b * PM_CODEC_BUCKET;
        /* A bucket without an alias is one whose last slot has itself for an alias. */
        const int whole = size == PM_CODEC_BUCKET, part = whole ? b : PM_CODEC_SYMBOLS + b;
        const int escape = table->has_escape && b == table->count - 1;
        const uint32_t exponent = (uint32_t)table->exponents[b] << type << (ONE_BYTE(type) ? 8 : 0);
        other[b] = table->part_symbol[part];
        bound[b] = (uint8_t)(size - (uint32_t)whole);
        put_entry(own, b, (uint32_t)table->part_offset[b]);
        put_entry(alias, b, (uint32_t)table->part_offset[part]);
        put_entry(factor, b, (uint32_t)table->frequencies[b] - PM_CODEC_SLOTS);
        put_entry(shown, b, escape ? 0x8000 : exponent);
    }
    return (decode_tables){
        broadcast(other),
        broadcast(bound),
        {broadcast(own[0]), broadcast(own[1])},
        {broadcast(alias[0]), broadcast(alias[1])},
        {broadcast(factor[0]), broadcast(factor[1])},
        {broadcast(shown[0]), broadcast(shown[1])},
        table->frequencies[0] == PM_CODEC_SLOTS,
    };
}

/* The lower half of each word of `a`, the upper of each of `b`. */
PM_TARGET PM_INLINE vb mix(vw a, vw b)
{
    return choose((vb)((vw){0} + 0x00ff), (vb)a, (vb)b);
}

/* Words of even and of odd lanes from their lower and upper bytes. */
PM_TARGET PM_INLINE vw even_words(const vb *bytes)
{
    return (vw)mix((vw)bytes[0], (vw)bytes[1] << 8);
}

PM_TARGET PM_INLINE vw odd_words(const vb *bytes)
{
    return (vw)mix((vw)bytes[0] >> 8, (vw)bytes[1]);
}

/* Moves the states of half the lanes of a group. Those whose bits are set in what comes back lack
 * their lower word. */
PM_TARGET PM_INLINE vw advance(vw *high, vw *low, vw factor, vw offset, int is_constant)
{
    const vw multiplier = factor << 4; /* 16 f, as 16 * 4096 is 65536 */
    const vw last = *low + offset + (*low >> 12) * factor; /* f (low div 4096) + offset */
    vw next_low = *high * multiplier + last;
    vw next_high = times_high(*high, multiplier) + 1 + (vw)(next_low >= last); /* no carry: -1 */
    if (is_constant)
        next_high = *high, next_low = *low;
    const vw takes = (vw)(next_high == 0);
    *high = (vw)choose((vb)takes, (vb)next_low, (vb)next_high);
    *low = next_low;
    return takes;
}

/* One step of a group's lanes: their symbols. */
PM_TARGET PM_INLINE vb step(const decode_tables *tables, lane_group *group, vw *even, vw *odd)
{
    const vb below = mix(group->even_low, group->odd_low << 8); /* slot mod 256 */
    const vb bucket = mix(group->even_low >> 8, group->odd_low) & 15;
    const vb alias = (vb)(below >= look_up(tables->bound, bucket));
    const vb symbol = choose(alias, look_up(tables->other, bucket), bucket);
    vb factor[2], offset[2];
    for (int i = 0; i < 2; i++) {
        factor[i] = look_up(tables->factor[i], symbol);
        offset[i] = choose(alias, look_up(tables->alias[i], bucket), look_up(tables->own[i], bucket));
    }
    *even = advance(&group->even_high, &group->even_low, even_words(factor), even_words(offset),
                    tables->is_constant);
    *odd = advance(&group->odd_high, &group->odd_low, odd_words(factor), odd_words(offset),
                   tables->is_constant);
    return symbol;
}

/* The escapes of the marked positions, in order; `shown` are lower and upper bytes. */
PM_TARGET static void put_escapes(flight *f, vb *shown, uint32_t escaped, int type)
{
    uint8_t bytes[2][VECTOR];
    memcpy(bytes, shown, sizeof bytes);
    for (; escaped != 0; escaped &= escaped - 1) {
        if (f->escape == f->escape_end) {
            f->good = 0;
            break;
        }
        const uint32_t exponent = (uint32_t)*f->escape++ << type << (ONE_BYTE(type) ? 8 : 0);
        const int at = __builtin_ctz(escaped);
        bytes[0][at] = (uint8_t)exponent;
        bytes[1][at] = (uint8_t)(exponent >> 8);
    }
    memcpy(shown, bytes, sizeof bytes);
}

/* By value: its byte of a plane of two bits, or of one, and its bits there. */
#define EIGHT(x) x, x, x, x, x, x, x, x
#define FOUR_TWICE(x) x, x, x, x, (x) + 1, (x) + 1, (x) + 1, (x) + 1
static const uint8_t two_bytes[32] = {FOUR_TWICE(0), FOUR_TWICE(2), FOUR_TWICE(4), FOUR_TWICE(6)};
static const uint8_t one_bytes[32] = {EIGHT(0), EIGHT(1), EIGHT(2), EIGHT(3)};
static const uint64_t two_low = 0x4010040140100401, two_high = 0x8020080280200802;
static const uint64_t one_bit = 0x8040201008040201;

/* For each value its byte of the plane at `plane`, of which a group has `bytes`: all bits set where
 * that has the bit of `bits`. */
PM_TARGET PM_INLINE vb spread(const uint8_t *plane, long bytes, const uint8_t *from, uint64_t bits)
{
    uint64_t some = 0;
    memcpy(&some, plane, (size_t)bytes);
    const vb mask = (vb)((vq){0} + bits);
    return (vb)((look_up((vb)((vq){0} + some), bytes_at(from)) & mask) == mask);
}

/* Puts sign and mantissa of a group's values to their exponents: lower and upper bytes, the latter
 * alone where a value is a byte. */
PM_TARGET PM_INLINE void put_rest(vb *shown, int type, const uint8_t *wide, const uint8_t *twos,
                                  const uint8_t *ones)
{
    if (type == TYPE_BF16) {
        const vb rest = bytes_at(wide);
        shown[0] |= rest & 0x7f;
        shown[1] |= rest & 0x80;
        return;
    }
    if (type == TYPE_E4M3) {
        const vw pairs = widen(wide), halves = pairs | pairs << 4;
        shown[1] |= ((vb)halves & 7) | ((vb)(halves << 4) & 0x80);
        return;
    }
    if (type == TYPE_F16)
        shown[0] = bytes_at(wide);
    shown[1] |= (spread(twos, VECTOR / 4, two_bytes, two_low) & 1) |
                (spread(twos, VECTOR / 4, two_bytes, two_high) & 2) |
                (spread(ones, VECTOR / 8, one_bytes, one_bit) & 0x80);
}

PM_TARGET PM_INLINE vd hash_step(vd hash, vd row)
{
    const vd mixed = hash + row * HASH_Q;
    return (mixed << 13 | mixed >> 19) * HASH_P;
}

/* A row's lower and upper bytes. */
typedef struct {
    vb shown[GROUPS][2];
} row_bytes;

PM_TARGET PM_INLINE row_bytes decode_bytes(const decode_tables *tables, flight *f, int type,
                                           uint32_t valid, const uint8_t *wide, const uint8_t *twos,
                                           const uint8_t *ones)
{
    vb symbols[GROUPS];
    vw even[GROUPS], odd[GROUPS];
    row_bytes row;
    for (int g = 0; g < GROUPS; g++)
        symbols[g] = step(tables, &f->lanes.groups[g], &even[g], &odd[g]);
    take_words(&f->lanes, even, odd, &f->words);
    for (int g = 0; g < GROUPS; g++) {
        vb *shown = row.shown[g];
        shown[0] = type == TYPE_BF16 ? look_up(tables->shown[0], symbols[g]) : (vb){0};
        shown[1] = look_up(tables->shown[1], symbols[g]);
        const uint32_t escaped = top_bits(shown[1]) & valid >> (g * VECTOR);
        if (__builtin_expect(escaped != 0, 0))
            put_escapes(f, shown, escaped, type);
        put_rest(shown, type, wide + g * VECTOR / (type == TYPE_E4M3 ? 2 : 1),
                 twos + g * VECTOR / 4, ones + g * VECTOR / 8);
    }
    return row;
}

/* Writes a row to `out`, and takes it into the checksum where it is the 64 bytes of a step. */
PM_TARGET PM_INLINE void put_row(flight *f, const row_bytes *row, int type, uint8_t *out)
{
    for (int g = 0; g < GROUPS; g++) {
        if (ONE_BYTE(type)) {
            memcpy(out + g * VECTOR, &row->shown[g][1], VECTOR);
            continue;
        }
        const vb low = zip_low(row->shown[g][0], row->shown[g][1]);
        const vb high = zip_high(row->shown[g][0], row->shown[g][1]);
        put_pair(out + 2 * g * VECTOR, low, high);
        f->hash.low[g] = hash_step(f->hash.low[g], (vd)low);
        f->hash.high[g] = hash_step(f->hash.high[g], (vd)high);
    }
}

PM_TARGET PM_INLINE void decode_row(const decode_tables *tables, flight *f, int type)
{
    const row_bytes row = decode_bytes(tables, f, type, 0xffffffff, f->wide, f->twos, f->ones);
    put_row(f, &row, type, f->out);
    move_on(f, type);
}

PM_TARGET PM_INLINE void decode_part(const decode_tables *tables, flight *f, int type, long count)
{
    const row_planes part = part_of_planes(f, type, count);
    row_bytes row = decode_bytes(tables, f, type, (1u << count) - 1, part.wide, part.twos, part.ones);
    uint8_t out[2 * PM_CODEC_LANES];
    for (long i = count; i < PM_CODEC_LANES; i++)
        for (int byte = 0; byte < 2; byte++)
            row.shown[i / VECTOR][byte][i % VECTOR] = 0;
    put_row(f, &row, type, out);
    memcpy(f->out, out, (size_t)(count * (ONE_BYTE(type) ? 1 : 2)));
}

/* As codec_tile.inc.h has it, a vector at a time: the memory of both goes on to a multiple of that. */
PM_TARGET static long find_symbols(const pm_codec_encoder *encoder, uint8_t *symbols, long values,
                                   uint8_t *escapes)
{
    const pm_codec_table *table = &encoder->table;
    const int shown = table->count - table->has_escape;
    long escaped = 0;
    for (long at = 0; at < values; at += VECTOR) {
        const vb exponents = bytes_at(symbols + at);
        vb found = (vb){0} + (uint8_t)shown, other = ~(vb){0};
        for (int s = 0; s < shown; s++) {
            const vb same = (vb)(exponents == table->exponents[s]);
            found = choose(same, (vb){0} + (uint8_t)s, found);
            other &= ~same;
        }
        uint32_t rest = top_bits(other);
        if (values - at < VECTOR)
            rest &= (1u << (values - at)) - 1;
        for (; rest != 0; rest &= rest - 1)
            escapes[escaped++] = symbols[at + __builtin_ctz(rest)];
        memcpy(symbols + at, &found, sizeof found);
    }
    return escaped;
}
