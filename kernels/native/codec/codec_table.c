/* Tables of a block: which exponents have symbols, and whose the slots are. */
#include "codec.h"

void pm_codec_place_slots(pm_codec_table *table)
{
    int left[PM_CODEC_SYMBOLS] = {0}, bound[PM_CODEC_SYMBOLS], other[PM_CODEC_SYMBOLS];
    int closed[PM_CODEC_SYMBOLS] = {0}, next[PM_CODEC_SYMBOLS] = {0};
    for (int b = 0; b < PM_CODEC_SYMBOLS; b++) {
        left[b] = b < table->count ? table->frequencies[b] : 0;
        bound[b] = PM_CODEC_BUCKET;
        other[b] = b;
    }
    for (;;) {
        int small = 0, large = 0;
        while (small < PM_CODEC_SYMBOLS && (closed[small] || left[small] >= PM_CODEC_BUCKET))
            small++;
        if (small == PM_CODEC_SYMBOLS)
            break;
        while (closed[large] || left[large] <= PM_CODEC_BUCKET)
            large++; /* exists: what is left fills the open buckets exactly */
        bound[small] = left[small];
        other[small] = large;
        closed[small] = 1;
        left[large] -= PM_CODEC_BUCKET - left[small];
    }
    for (int b = 0; b < PM_CODEC_SYMBOLS; b++) {
        const int first = b * PM_CODEC_BUCKET, alias = PM_CODEC_SYMBOLS + b;
        table->limit[b] = (uint32_t)(first + bound[b]);
        table->part_symbol[b] = (uint8_t)b;
        table->part_offset[b] = next[b] - first;
        next[b] += bound[b];
        table->part_symbol[alias] = (uint8_t)other[b];
        table->part_offset[alias] = next[other[b]] - first - bound[b];
        next[other[b]] += PM_CODEC_BUCKET - bound[b];
    }
}

/* The slots of a part: bucket b's own, or from PM_CODEC_SYMBOLS on those of its alias. */
static uint32_t part_begin(const pm_codec_table *table, int part)
{
    return part < PM_CODEC_SYMBOLS ? (uint32_t)part * PM_CODEC_BUCKET
                                   : table->limit[part - PM_CODEC_SYMBOLS];
}

static uint32_t part_end(const pm_codec_table *table, int part)
{
    return part < PM_CODEC_SYMBOLS ? table->limit[part]
                                   : (uint32_t)(part - PM_CODEC_SYMBOLS + 1) * PM_CODEC_BUCKET;
}

void pm_codec_fill_decoder(pm_codec_decoder *decoder)
{
    const pm_codec_table *table = &decoder->table;
    for (int part = 0; part < 2 * PM_CODEC_SYMBOLS; part++) {
        const int symbol = table->part_symbol[part];
        const uint32_t says = (uint32_t)table->frequencies[symbol] << 18 |
                              (uint32_t)(table->part_offset[part] + PM_CODEC_SLOTS) << 5 |
                              (uint32_t)symbol;
        for (uint32_t slot = part_begin(table, part); slot < part_end(table, part); slot++)
            decoder->slots[slot] = says;
    }
}

void pm_codec_choose_table(pm_codec_encoder *encoder, const uint64_t *counts, uint64_t total)
{
    pm_codec_table *table = &encoder->table;
    uint64_t left = total;
    int distinct = 0, sum = 0;
    memset(encoder, 0, sizeof *encoder);
    memset(encoder->escaped, 1, sizeof encoder->escaped);
    for (int e = 0; e < 256; e++)
        distinct += counts[e] > 0;
    table->has_escape = distinct > PM_CODEC_SYMBOLS;
    table->count = table->has_escape ? PM_CODEC_SYMBOLS : distinct;
    memset(encoder->symbol_of, table->count - 1, sizeof encoder->symbol_of);
    for (int s = 0; s < table->count; s++) {
        uint64_t shown = left;
        if (!table->has_escape || s < table->count - 1) {
            int best = -1;
            for (int e = 0; e < 256; e++)
                if (encoder->escaped[e] && counts[e] > 0 &&
                    (best < 0 || counts[e] > counts[best]))
                    best = e;
            table->exponents[s] = (uint8_t)best;
            encoder->symbol_of[best] = (uint8_t)s;
            encoder->escaped[best] = 0;
            shown = counts[best];
            left -= shown;
        }
        const uint64_t frequency = shown * PM_CODEC_SLOTS / total;
        table->frequencies[s] = (uint16_t)(frequency > 0 ? frequency : 1);
        sum += table->frequencies[s];
    }
    table->frequencies[0] = (uint16_t)(table->frequencies[0] + PM_CODEC_SLOTS - sum);
    pm_codec_place_slots(table);
    uint32_t used = 0;
    for (int s = 0; s < table->count; s++) {
        encoder->starts[s] = used;
        /* Too large by 1 at most: quotients of x < 2^32 by less than 2^-12, which is no more than a
         * remainder leaves; and x < 2^20 frequency, which a product has room for. */
        encoder->reciprocals[s] = (1ull << PM_CODEC_RECIPROCAL_BITS) / table->frequencies[s] + 1;
        used += table->frequencies[s];
    }
    for (int part = 0; part < 2 * PM_CODEC_SYMBOLS; part++) {
        const uint32_t start = encoder->starts[table->part_symbol[part]];
        const uint32_t shift = start + (uint32_t)table->part_offset[part];
        for (uint32_t slot = part_begin(table, part); slot < part_end(table, part); slot++)
            encoder->slot_of[shift + slot] = (uint16_t)slot;
    }
}
