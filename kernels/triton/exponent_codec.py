"""Decoding blocks of 16-bit values on a GPU; the format is in ``kernels.codec.layout``.

Half a warp decodes a tile: a thread has two lanes, of an even and the following odd position, so
that it stores both values as one word, which is also the word that it hashes. Rows follow one
another; ranks of the lanes that take a word, and of those that take an escape, come out of one
prefix sum over bytes of one integer. The table has 80 integers and stays in the first cache.

What the kernel reads lies within the sections that the (checked) header states, whatever they hold.
A tile is damaged unless its words and escapes are used up, its states have come to rest, and its
values have the checksum of the directory.

Roofline: about 0.67 bytes read and 1 written per byte; some 90 integer instructions and two
dependent loads per row and half warp: bound by latency where few tiles are in flight, else by
instructions, an estimated 1 TB/s of output on an H100. Not measured on a device yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from kernels import codec
from kernels.codec import layout
from kernels.codec.layout import FLOAT_TYPES, CodecError, FloatType
from kernels.reference import exponent_codec as reference
from kernels.triton.launch import Launch, ceil_div, require

TILES = 8
"""Per program, two to a warp. Guess."""

LIMITS, PARTS, SHOWN = 0, 16, 48
TABLE_WORDS = 80
"""Of the table: limits by bucket, what parts say (as in codec.h) and exponents by symbol."""

TILE_WORDS = 4
"""Per tile: where its section is, in words of four bytes, its words, escapes and checksum."""

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
def signs_and_mantissas(planes_ptr, value, values, held, block_values, MANTISSA: tl.constexpr):
    """Sign and mantissa of the values, each where it belongs in a word of 16 bits."""
    low = tl.load(planes_ptr + value, mask=held, other=0).to(tl.uint32) & 0xFF
    if MANTISSA == 7:
        return ((low & 128) << 8) | (low & 127)
    twos_ptr = planes_ptr + block_values
    ones_ptr = twos_ptr + (block_values * 2 + 7) // 8
    two = tl.load(twos_ptr + value // 4, mask=held, other=0).to(tl.uint32) >> (value % 4 * 2)
    one = tl.load(ones_ptr + value // 8, mask=held, other=0).to(tl.uint32) >> (value % 8)
    return ((one & 1) << 15) | ((two & 3) << 8) | low


@triton.jit(do_not_specialize=["planes_at", "tiles", "block_values", "rows"])
def exponent_decode_kernel(
    bytes_ptr, words_ptr, states_ptr, table_ptr, tiles_ptr, planes_at,
    pairs_ptr, out_ptr, damaged_ptr, tiles, block_values, rows,
    MANTISSA: tl.constexpr, TILES: tl.constexpr, TILE_VALUES: tl.constexpr,
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
    taken = section * 0
    escaped = section * 0
    beyond = even * 0
    hashed = (tile * 0 + lane).to(tl.uint32) * P
    for row in range(rows):
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
        next_even = refilled(next_even, low_even, own_words_ptr, taken + (before & 255), num_words)
        next_odd = refilled(
            next_odd, low_odd, own_words_ptr, after_even + ((before >> 8) & 255), num_words
        )
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
        rest_even = signs_and_mantissas(
            bytes_ptr + planes_at, first + value, values, has_even, block_values, MANTISSA
        )
        rest_odd = signs_and_mantissas(
            bytes_ptr + planes_at, first + value + 1, values, has_odd, block_values, MANTISSA
        )
        whole_even = rest_even | (show_even.to(tl.uint32) << MANTISSA)
        whole_odd = rest_odd | (show_odd.to(tl.uint32) << MANTISSA)
        beyond |= tl.where(has_even, (show_even >> (15 - MANTISSA)).to(tl.uint32), 0)
        beyond |= tl.where(has_odd, (show_odd >> (15 - MANTISSA)).to(tl.uint32), 0)
        pair = tl.where(has_even, whole_even & 0xFFFF, 0)
        pair |= tl.where(has_odd, whole_odd << 16, 0)
        tl.store(pairs_ptr + (first + value) // 2, pair.to(tl.int32, bitcast=True), mask=has_odd)
        alone = has_even & (value + 1 == values)
        tl.store(out_ptr + first + value, whole_even.to(tl.int16), mask=alone)
        # A row is the 64 bytes of one step of the checksum.
        hashed = tl.where(active, hash_round(hashed, pair), hashed)
    wrong = (even != 65536) | (odd != 65536) | (beyond != 0)
    wrong |= (taken != num_words) | (escaped != num_escapes)
    sum_ = (values * 2).to(tl.uint32)
    for number in tl.static_range(16):
        own_lane = tl.sum(tl.where(lane == number, hashed, 0), 1, keep_dims=True)
        sum_ = hash_round(sum_, own_lane.to(tl.uint32))
    sum_ ^= sum_ >> 15
    sum_ *= Q
    sum_ ^= sum_ >> 13
    wrong |= sum_ != stated
    tl.store(damaged_ptr + tile, tl.max(wrong.to(tl.int32), 1, keep_dims=True), mask=there)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """A header as the kernel wants it: where the planes begin, and on the host the table and an
    entry of ``TILE_WORDS`` per tile as int32."""

    kind: FloatType
    values: int
    planes_at: int
    table: torch.Tensor
    tiles: torch.Tensor


def read_header(block: memoryview | bytes) -> BlockPlan | None:
    """The plan of a block of 16-bit values, from its bytes on the host; None where it is raw.

    Raises:
        CodecError: the header is damaged.
        ValueError: the values have 8 bits.
    """
    content = np.frombuffer(block, np.uint8)
    decoded = reference.check(content)
    _, _, method, code, detail, _, _ = layout.HEADER.unpack_from(block)
    if method == layout.RAW:
        return None
    kind = next(kind for kind in FLOAT_TYPES.values() if kind.code == code)
    if kind.bytes != 2:
        raise ValueError("only values of 16 bits are decoded on a GPU")
    head = layout.header_bytes(method, decoded, 2)
    known = reference.read_table(content, detail)
    table = np.zeros(TABLE_WORDS, np.int32)
    bound, other = known.aliases()
    _, offset = known.slots()
    begins = np.arange(0, layout.SLOTS, layout.BUCKET)
    symbols = np.concatenate([np.arange(layout.SYMBOLS), other])
    slots = np.concatenate([begins, begins + bound]) % layout.SLOTS
    frequencies = np.zeros(layout.SYMBOLS, np.int64)
    frequencies[: len(known.frequencies)] = known.frequencies
    table[LIMITS:PARTS] = begins + bound
    table[PARTS:SHOWN] = frequencies[symbols] << 18 | offset[slots] - slots + 4096 << 5 | symbols
    shown = known.exponents.astype(np.int32)
    if known.has_escape:
        shown[-1] = ESCAPED.value
    table[SHOWN : SHOWN + len(shown)] = shown
    planes_at = head + layout.CHECKSUM_BYTES
    entries = np.array(reference.directory(content, head), np.uint32)
    sizes = 32 + -(-(2 * entries[:, 0].astype(np.int64) + entries[:, 1]) // 4)
    first = (planes_at + reference.planes_bytes(decoded // 2, kind)) // 4
    sections = first + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    tiles = np.column_stack([sections.astype(np.uint32), entries]).view(np.int32)
    return BlockPlan(
        kind, decoded // 2, planes_at, torch.from_numpy(table), torch.from_numpy(tiles)
    )


def plan_decode(
    plan: BlockPlan,
    block: torch.Tensor,
    table: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    damaged: torch.Tensor,
) -> Launch:
    """Decode ``block`` [bytes] uint8 into ``out`` [values] int16.

    Args:
        table, tiles: the plan's, where ``block`` is.
        damaged: [tiles] int32; 0 for each tile that is sound.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    count = tiles.shape[0]
    require(
        block.dtype is torch.uint8
        and out.dtype is torch.int16
        and out.shape == (plan.values,)
        and tiles.shape == (ceil_div(plan.values, layout.TILE_VALUES), TILE_WORDS)
        and damaged.shape == (count,)
        and all(t.is_contiguous() for t in (block, table, tiles, out, damaged))
        and block.numel() % 4 == 0
        and out.data_ptr() % 4 == 0,
        "exponent_decode",
        *(block, table, tiles, out, damaged),
    )
    return Launch(
        exponent_decode_kernel,
        (ceil_div(count, TILES),),
        {
            "bytes_ptr": block,
            "words_ptr": block.view(torch.int16),
            "states_ptr": block.view(torch.int32),
            "table_ptr": table,
            "tiles_ptr": tiles,
            "planes_at": plan.planes_at,
            "pairs_ptr": out[: plan.values // 2 * 2].view(torch.int32),
            "out_ptr": out,
            "damaged_ptr": damaged,
            "tiles": count,
            "block_values": plan.values,
            "rows": ceil_div(min(plan.values, layout.TILE_VALUES), layout.LANES),
        },
        {"MANTISSA": plan.kind.mantissa_bits, "TILES": TILES, "TILE_VALUES": layout.TILE_VALUES},
        warps=TILES // 2,
    )


def decode_block(block: bytes | memoryview, device: torch.device) -> torch.Tensor:
    """The values of ``block``, on the host, as [values] int16 on ``device``.

    Raises:
        CodecError: the block is damaged.
        ValueError: its values have 8 bits.
    """
    plan = read_header(block)
    if plan is None:
        host = np.empty(codec.decoded_bytes(block), np.uint8)
        codec.decode_into(block, host)
        return torch.from_numpy(host.view(np.int16)).to(device)
    moved = torch.frombuffer(bytearray(block), dtype=torch.uint8).to(device)
    out = torch.empty(plan.values, dtype=torch.int16, device=device)
    damaged = torch.empty(len(plan.tiles), dtype=torch.int32, device=device)
    table, tiles = plan.table.to(device), plan.tiles.to(device)
    plan_decode(plan, moved, table, tiles, out, damaged).run()
    if bool(damaged.any()):
        raise CodecError("a block's content is damaged")
    return out
