"""The kernel that decodes blocks of the lossless format (``kernels.codec.layout``).

Half a warp decodes a tile: a thread has two lanes, of an even and the following odd position. Two
values of 16 bits are a word, which it stores and hashes; of 8 bits it takes four, so two rows are
decoded and then put together. Rows follow one another; ranks of the lanes that take a word, and of
those that take an escape, come out of one prefix sum over bytes of one integer. The table has 80
integers and stays in the first cache.

What the kernel reads lies within the sections that the (checked) header states, whatever they hold.
A tile is damaged unless its words and escapes are used up, its states have come to rest, and its
values have the checksum of the directory.

Roofline: about 0.67 bytes read and 1 written per byte of 16-bit values; some 90 integer
instructions and two dependent loads per row and half warp: bound by latency where few tiles are in
flight, else by instructions, an estimated 1 TB/s of output on an H100, half of that for 8-bit
values. Not measured on a device yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

ESCAPED = tl.constexpr(1 << 16)
"""Stands for the escape among exponents."""

P, Q = tl.constexpr(2654435761), tl.constexpr(2246822519)


@triton.jit
def step(x, table_ptr):
    """States after one symbol each, before they take words, and the symbols' exponents."""
    slot = (x & 4095).to(tl.int32)
    bucket = slot >> 8
    alias = slot >= tl.load(table_ptr + bucket)
    says = tl.load(table_ptr + 16 + bucket + tl.where(alias, 16, 0))
    shown = tl.load(table_ptr + 48 + (says & 31))
    rest = slot + ((says >> 5) & 8191) - 4096
    return (says >> 18).to(tl.uint32) * (x >> 12) + rest.to(tl.uint32), shown


@triton.jit
def refilled(x, low, words_ptr, index, words):
    """``x`` with the words at ``index`` where ``low``; zeros beyond the section's ``words``."""
    word = tl.load(words_ptr + index, mask=low & (index < words), other=0)
    return tl.where(low, (x << 16) | (word.to(tl.uint32) & 0xFFFF), x)


@triton.jit
def hash_round(state, word):
    """One round of the checksum, on uint32."""
    mixed = state + word * Q
    return ((mixed << 13) | (mixed >> 19)) * P


@triton.jit
def piece(plane_ptr, value, held, WIDTH: tl.constexpr):
    """The ``WIDTH`` bits that a plane has of ``value``."""
    byte = tl.load(plane_ptr + value // (8 // WIDTH), mask=held, other=0).to(tl.uint32)
    return (byte >> (value % (8 // WIDTH) * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def signs_and_mantissas(planes_ptr, value, held, block_values, MANTISSA: tl.constexpr):
    """Sign and mantissa of the values, each where it belongs in a word of their width."""
    if MANTISSA == 7:
        low = piece(planes_ptr, value, held, 8)
        return ((low & 128) << 8) | (low & 127)
    if MANTISSA == 3:
        low = piece(planes_ptr, value, held, 4)
        return ((low & 8) << 4) | (low & 7)
    if MANTISSA == 10:
        low = piece(planes_ptr, value, held, 8)
        twos_ptr = planes_ptr + block_values
    else:
        low = tl.zeros_like(value).to(tl.uint32)
        twos_ptr = planes_ptr
    two = piece(twos_ptr, value, held, 2)
    one = piece(twos_ptr + (block_values * 2 + 7) // 8, value, held, 1)
    if MANTISSA == 10:
        return (one << 15) | (two << 8) | low
    return (one << 7) | two


@triton.jit
def decode_row(
    row, there, first, values, even, odd, taken, escaped, beyond,
    words_ptr, num_words, escapes_ptr, num_escapes, planes_ptr, table_ptr, block_values,
    MANTISSA: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """States, what was taken and what was wrong after row ``row`` of each tile, and its values, two
    to a word: the even one low; zeros where no value is. [TILES, 16] each."""
    lane = tl.arange(0, 16)[None, :]
    value = row * 32 + 2 * lane  # [1, 16], of the even lanes
    active = there & (row * 32 < values)  # [TILES, 1]
    has_even, has_odd = value < values, value + 1 < values
    next_even, show_even = step(even, table_ptr)
    next_odd, show_odd = step(odd, table_ptr)
    low_even, low_odd = (next_even < 65536) & active, (next_odd < 65536) & active
    escape_even = (show_even == ESCAPED) & has_even
    escape_odd = (show_odd == ESCAPED) & has_odd
    counted = low_even.to(tl.int32) + (low_odd.to(tl.int32) << 8)
    counted += (escape_even.to(tl.int32) + escape_odd.to(tl.int32)) << 16
    upto = tl.cumsum(counted, 1)
    total = tl.sum(counted, 1, keep_dims=True)  # [TILES, 1]
    before = upto - counted
    after_even = taken + (total & 255)
    next_even = refilled(next_even, low_even, words_ptr, taken + (before & 255), num_words)
    next_odd = refilled(next_odd, low_odd, words_ptr, after_even + ((before >> 8) & 255), num_words)
    at = escaped + (before >> 16)
    own = tl.load(escapes_ptr + at, mask=escape_even & (at < num_escapes), other=0)
    show_even = tl.where(escape_even, own.to(tl.int32) & 0xFF, show_even)
    at += escape_even.to(tl.int32)
    own = tl.load(escapes_ptr + at, mask=escape_odd & (at < num_escapes), other=0)
    show_odd = tl.where(escape_odd, own.to(tl.int32) & 0xFF, show_odd)
    even = tl.where(active, next_even, even)
    odd = tl.where(active, next_odd, odd)
    taken = after_even + ((total >> 8) & 255)
    escaped += total >> 16
    whole_even = signs_and_mantissas(planes_ptr, first + value, has_even, block_values, MANTISSA)
    whole_odd = signs_and_mantissas(planes_ptr, first + value + 1, has_odd, block_values, MANTISSA)
    whole_even |= show_even.to(tl.uint32) << MANTISSA
    whole_odd |= show_odd.to(tl.uint32) << MANTISSA
    beyond |= tl.where(has_even, (show_even >> (BITS - 1 - MANTISSA)).to(tl.uint32), 0)
    beyond |= tl.where(has_odd, (show_odd >> (BITS - 1 - MANTISSA)).to(tl.uint32), 0)
    pair = tl.where(has_even, whole_even & ((1 << BITS) - 1), 0)
    pair |= tl.where(has_odd, (whole_odd & ((1 << BITS) - 1)) << BITS, 0)
    return even, odd, taken, escaped, beyond, pair


@triton.jit
def store_word(out_words_ptr, out_ptr, first, at, word, values, BITS: tl.constexpr):
    """The values in ``word``, the first of which is number ``at`` of its tile."""
    count: tl.constexpr = 32 // BITS
    whole = at + (count - 1) < values
    place = out_words_ptr + (first + at) // count
    tl.store(place, word.to(tl.int32, bitcast=True), mask=whole)
    for number in tl.static_range(count - 1):  # of a tile's last word
        own = (word >> (number * BITS)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + first + at + number, own, mask=~whole & (at + number < values))


@triton.jit(do_not_specialize=["planes_at", "tiles", "block_values", "steps"])
def exponent_decode_kernel(
    bytes_ptr, words_ptr, states_ptr, table_ptr, tiles_ptr, planes_at,
    out_words_ptr, out_ptr, damaged_ptr, tiles, block_values, steps,
    MANTISSA: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr, TILE_VALUES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)[:, None]  # [TILES, 1]
    lane = tl.arange(0, 16)[None, :]  # [1, 16]
    there = tile < tiles
    entry = tiles_ptr + tile * 4
    section = tl.load(entry, mask=there, other=0)
    num_words = tl.load(entry + 1, mask=there, other=0)
    num_escapes = tl.load(entry + 2, mask=there, other=0)
    stated = tl.load(entry + 3, mask=there, other=0).to(tl.uint32, bitcast=True)
    first = tile * TILE_VALUES
    values = tl.minimum(block_values - first, TILE_VALUES)  # of the tile; below 0 where no tile is
    even = tl.load(states_ptr + section + lane, mask=there, other=0).to(tl.uint32, bitcast=True)
    odd = tl.load(states_ptr + section + 16 + lane, mask=there, other=0).to(
        tl.uint32, bitcast=True
    )  # [TILES, 16]
    own_words_ptr = words_ptr + (section + 32) * 2
    escapes_ptr = bytes_ptr + (section + 32) * 4 + num_words * 2
    planes_ptr = bytes_ptr + planes_at
    taken = section * 0
    escaped = section * 0
    beyond = even * 0
    hashed = (tile * 0 + lane).to(tl.uint32) * P
    for number in range(steps):  # of the checksum: 64 bytes
        if BITS == 16:
            even, odd, taken, escaped, beyond, word = decode_row(
                number, there, first, values, even, odd, taken, escaped, beyond,
                own_words_ptr, num_words, escapes_ptr, num_escapes, planes_ptr, table_ptr,
                block_values, MANTISSA, BITS,
            )  # fmt: skip
        else:
            even, odd, taken, escaped, beyond, upper = decode_row(
                2 * number, there, first, values, even, odd, taken, escaped, beyond,
                own_words_ptr, num_words, escapes_ptr, num_escapes, planes_ptr, table_ptr,
                block_values, MANTISSA, BITS,
            )  # fmt: skip
            even, odd, taken, escaped, beyond, lower = decode_row(
                2 * number + 1, there, first, values, even, odd, taken, escaped, beyond,
                own_words_ptr, num_words, escapes_ptr, num_escapes, planes_ptr, table_ptr,
                block_values, MANTISSA, BITS,
            )  # fmt: skip
            # A row has 16 pairs of values, neighbours of which are a word.
            pairs = tl.join(upper, lower).permute(0, 2, 1).reshape(TILES, 16, 2)
            low, high = tl.split(pairs)
            word = low | (high << 16)
        at = (number * 16 + lane) * (32 // BITS)
        store_word(out_words_ptr, out_ptr, first, at, word, values, BITS)
        active = there & (number * (512 // BITS) < values)
        hashed = tl.where(active, hash_round(hashed, word), hashed)
    wrong = (even != 65536) | (odd != 65536) | (beyond != 0)
    wrong |= (taken != num_words) | (escaped != num_escapes)
    sum_ = (values * (BITS // 8)).to(tl.uint32)
    for number in tl.static_range(16):
        own_lane = tl.sum(tl.where(lane == number, hashed, 0), 1, keep_dims=True)
        sum_ = hash_round(sum_, own_lane.to(tl.uint32))
    sum_ ^= sum_ >> 15
    sum_ *= Q
    sum_ ^= sum_ >> 13
    wrong |= sum_ != stated
    tl.store(damaged_ptr + tile, tl.max(wrong.to(tl.int32), 1, keep_dims=True), mask=there)
