"""Decoding blocks on a GPU: what the host reads of a block, and the launch that decodes it.

The format is in ``kernels.codec.layout``, the kernel in ``kernels.triton.exponent_kernel``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels import codec
from kernels.codec import layout
from kernels.codec.layout import FLOAT_TYPES, CodecError, FloatType
from kernels.reference import exponent_codec as reference
from kernels.triton.exponent_kernel import ESCAPED, exponent_decode_kernel
from kernels.triton.launch import Launch, ceil_div, require

TILES = 8
"""Per program, two to a warp. Guess."""

LIMITS, PARTS, SHOWN = 0, 16, 48
TABLE_WORDS = 80
"""Of the table: limits by bucket, what parts say (as in codec.h) and exponents by symbol."""

TILE_WORDS = 4
"""Per tile: where its section is, in words of four bytes, its words, escapes and checksum."""

_DTYPES = {1: torch.uint8, 2: torch.int16}
"""Of decoded values, by their bytes."""


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
    """The plan of a block, from its bytes on the host; None where it is raw.

    Raises:
        CodecError: the header is damaged.
    """
    content = np.frombuffer(block, np.uint8)
    decoded = reference.check(content)
    _, _, method, code, detail, _, _ = layout.HEADER.unpack_from(block)
    if method == layout.RAW:
        return None
    kind = next(kind for kind in FLOAT_TYPES.values() if kind.code == code)
    head = layout.header_bytes(method, decoded, kind.bytes)
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
    values = decoded // kind.bytes
    first = (planes_at + reference.planes_bytes(values, kind)) // 4
    sections = first + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    tiles = np.column_stack([sections.astype(np.uint32), entries]).view(np.int32)
    return BlockPlan(kind, values, planes_at, torch.from_numpy(table), torch.from_numpy(tiles))


def plan_decode(
    plan: BlockPlan,
    block: torch.Tensor,
    table: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    damaged: torch.Tensor,
) -> Launch:
    """Decode ``block`` [bytes] uint8 into ``out`` [values] int16, or uint8 as the values are.

    Args:
        table, tiles: the plan's, where ``block`` is.
        damaged: [tiles] int32; 0 for each tile that is sound.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    count = tiles.shape[0]
    bits = 8 * plan.kind.bytes
    a_word = 32 // bits  # values
    require(
        block.dtype is torch.uint8
        and out.dtype is _DTYPES[plan.kind.bytes]
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
            "out_words_ptr": out[: plan.values // a_word * a_word].view(torch.int32),
            "out_ptr": out,
            "damaged_ptr": damaged,
            "tiles": count,
            "block_values": plan.values,
            "steps": ceil_div(min(plan.values, layout.TILE_VALUES), 16 * a_word),
        },
        {
            "MANTISSA": plan.kind.mantissa_bits,
            "BITS": bits,
            "TILES": TILES,
            "TILE_VALUES": layout.TILE_VALUES,
        },
        warps=TILES // 2,
    )


def decode_block(block: bytes | memoryview, device: torch.device) -> torch.Tensor:
    """The values of ``block``, on the host, as [values] int16 on ``device``, or uint8 where they
    have 8 bits or no known width.

    Raises:
        CodecError: the block is damaged.
    """
    plan = read_header(block)
    if plan is None:
        host = np.empty(codec.decoded_bytes(block), np.uint8)
        codec.decode_into(block, host)
        known = FLOAT_TYPES.get(codec.describe(block).dtype)
        is_wide = known is not None and known.bytes == 2
        return torch.from_numpy(host.view(np.int16) if is_wide else host).to(device)
    moved = torch.frombuffer(bytearray(block), dtype=torch.uint8).to(device)
    out = torch.empty(plan.values, dtype=_DTYPES[plan.kind.bytes], device=device)
    damaged = torch.empty(len(plan.tiles), dtype=torch.int32, device=device)
    table, tiles = plan.table.to(device), plan.tiles.to(device)
    plan_decode(plan, moved, table, tiles, out, damaged).run()
    if bool(damaged.any()):
        raise CodecError("a block's content is damaged")
    return out
