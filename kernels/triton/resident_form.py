"""The resident form read on a GPU: a whole matrix into 16 bits, and single rows of it.

The layout is that of ``kernels.resident``, the one that a CPU packs. It suits a GPU as it is: a
group of a tile is three lines of 128 bytes, of which every load of 16 bytes per thread uses all; a
word of four code bytes has the codes of four columns of two rows, those of columns 0 and 2 and of
columns 1 and 3 sixteen bits apart, as they are wanted. So two weights are decoded at a time, in the
halves of a word: three operations a weight where the palette is a window of 16 exponents in a row,
since a code is then added to the first; some ten where it is not, and codes are looked up.

Escapes have the code 0 in the planes. Here they overwrite what was stored for them.

Roofline of ``unpack``: 1.5 bytes read and 2 written per weight; with 5 integer operations a weight,
of which an H200 does 15 T/s, memory is the bound. Not measured on a device yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.resident import (
    GROUP_BYTES,
    GROUP_COLUMNS,
    PALETTE,
    TILE_ROWS,
    ResidentMatrix,
    group_count,
    tile_count,
)
from kernels.triton.launch import Launch, ceil_div, require

UNPACK_TILES, UNPACK_GROUPS = 2, 16
"""Of a program of four warps: a thread has 16 bytes of each of four rows at once. Guess."""

ESCAPES = 32
"""Escapes of a tile that are handled at a time: a trained matrix of 4,096 columns has about three
in a tile. Guess."""

ROW_GROUPS = 16
"""Of a row that a program decodes at once. Guess."""

GROUP_WORDS = tl.constexpr(GROUP_BYTES // 4)
ROW_WORDS = tl.constexpr(GROUP_COLUMNS // 4)
CODE_WORDS = tl.constexpr(TILE_ROWS * GROUP_COLUMNS // 4)
"""In words of four bytes: a group, a row of one, and where its codes begin."""


@triton.jit
def columns_of(word):
    """The first of the four columns, within its group, of word ``word`` of a row."""
    return (word >> 2) * 8 + ((word >> 1) & 1) * 32 + (word & 1) * 4


@triton.jit
def looked_up(code, low, high):
    """The exponents of ``code``; ``low`` and ``high`` are the palette, a byte each, as int64."""
    half = tl.where(code < 8, low, high)
    return ((half >> ((code & 7) * 8).to(tl.int64)) & 255).to(tl.int32)


@triton.jit
def exponents(codes, low, high, WINDOW: tl.constexpr):
    """Two exponents, each at its place in half a word, of the codes at bits 0 and 16."""
    codes &= 0x000F000F
    if WINDOW:
        return codes * 128 + ((low & 255) * 0x00800080).to(tl.int32)
    return (looked_up(codes & 15, low, high) << 7) | (looked_up(codes >> 16, low, high) << 23)


@triton.jit
def weight_pairs(rests, codes, low, high, WINDOW: tl.constexpr):
    """Four weights of a row: columns 0 and 2 as the halves of a word, then columns 1 and 3.

    ``rests``: their signs and mantissas. ``codes``: theirs in the low half of each byte.
    """
    even = ((rests << 8) & -0x7FFF8000) | (rests & 0x007F007F)
    odd = (rests & -0x7FFF8000) | ((rests >> 8) & 0x007F007F)
    even |= exponents(codes, low, high, WINDOW)
    odd |= exponents(codes >> 8, low, high, WINDOW)
    return even, odd


@triton.jit
def bits_of(rest, exponent):
    """A weight of 16 bits, in the low half of a word."""
    return ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)


@triton.jit
def place_of(column):
    """The byte of a group's row that ``column`` has."""
    return (column // 8 % 4) * 16 + column // 32 * 8 + column % 8


@triton.jit
def store_four(out_ptr, at, even, odd, column, inside, DEPTH: tl.constexpr):
    """Four weights to columns [column, column + 4) of the row at ``at``."""
    if DEPTH % 4 == 0:
        first = (even & 0xFFFF) | (odd << 16)
        second = ((even >> 16) & 0xFFFF) | (odd & -0x10000)
        four = (first.to(tl.int64) & 0xFFFFFFFF) | (second.to(tl.int64) << 32)
        fours_ptr = out_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        fours = column // 4  # those of two words follow one another: 16 bytes
        fours = tl.max_contiguous(tl.multiple_of(fours, [1, 1, 2]), [1, 1, 2])
        tl.store(fours_ptr + at // 4 + fours, four, mask=inside & (column < DEPTH))
    else:
        at += column
        tl.store(out_ptr + at, even.to(tl.int16), mask=inside & (column < DEPTH))
        tl.store(out_ptr + at + 1, odd.to(tl.int16), mask=inside & (column + 1 < DEPTH))
        even >>= 16
        odd >>= 16
        tl.store(out_ptr + at + 2, even.to(tl.int16), mask=inside & (column + 2 < DEPTH))
        tl.store(out_ptr + at + 3, odd.to(tl.int16), mask=inside & (column + 3 < DEPTH))


@triton.jit(do_not_specialize=["low", "high", "first_tile", "end_tile", "end_row"])
def resident_unpack_kernel(
    words_ptr, bytes_ptr, starts_ptr, escapes_ptr, out_ptr, low, high,
    first_tile, end_tile, end_row,
    DEPTH: tl.constexpr, GROUPS: tl.constexpr, WINDOW: tl.constexpr,
    TILES: tl.constexpr, BLOCK_GROUPS: tl.constexpr, ESCAPES: tl.constexpr,
):  # fmt: skip
    first = first_tile + tl.program_id(0).to(tl.int64) * TILES
    group_at = tl.program_id(1) * BLOCK_GROUPS
    tile = tl.arange(0, TILES)[:, None, None]
    group = group_at + tl.arange(0, BLOCK_GROUPS)[None, :, None]
    word = tl.arange(0, ROW_WORDS)[None, None, :]
    held = (first + tile < end_tile) & (group < GROUPS)
    at = words_ptr + first * GROUPS * GROUP_WORDS
    at += tile * (GROUPS * GROUP_WORDS) + group * GROUP_WORDS + word  # [TILES, GROUPS, 16]
    column = group * 64 + columns_of(word)
    for pair in tl.static_range(2):
        codes = tl.load(at + CODE_WORDS + pair * ROW_WORDS, mask=held, other=0)
        for half in tl.static_range(2):
            rests = tl.load(at + (2 * pair + half) * ROW_WORDS, mask=held, other=0)
            even, odd = weight_pairs(rests, codes >> (4 * half), low, high, WINDOW)
            row = (first + tile) * 4 + 2 * pair + half
            out_at = (row - first_tile * 4) * DEPTH
            store_four(out_ptr, out_at, even, odd, column, held & (row < end_row), DEPTH)
    tl.debug_barrier()  # what escapes overwrite is there
    for number in range(TILES):
        if first + number < end_tile:
            begin = tl.load(starts_ptr + first + number)
            end = tl.load(starts_ptr + first + number + 1)
            tile_at = bytes_ptr + (first + number) * GROUPS * (GROUP_WORDS * 4)
            for upto in range(begin, end, ESCAPES):
                index = upto + tl.arange(0, ESCAPES)
                escape = tl.load(escapes_ptr + index, mask=index < end, other=0)
                its_group, its_column = escape >> 16, (escape >> 8) & 63
                its_row = (escape >> 14) & 3
                # Programs share a tile's list, and each stores what lies in its groups.
                mine = (index < end) & (its_group >= group_at)
                mine &= its_group < group_at + BLOCK_GROUPS
                rest_at = its_group * (GROUP_WORDS * 4) + its_row * 64 + place_of(its_column)
                rest = tl.load(tile_at + rest_at, mask=mine, other=0).to(tl.int32)
                to = ((first - first_tile + number) * 4 + its_row) * DEPTH
                to += its_group * 64 + its_column
                weight = bits_of(rest, escape & 255)
                tl.store(out_ptr + to, weight.to(tl.int16), mask=mine)


@triton.jit(do_not_specialize=["low", "high", "rows"])
def resident_rows_kernel(
    words_ptr, bytes_ptr, starts_ptr, escapes_ptr, ids_ptr, out_ptr, low, high, rows,
    DEPTH: tl.constexpr, GROUPS: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, ESCAPES: tl.constexpr,
):  # fmt: skip
    # An id that the matrix has no row for reads the nearest row, and nothing outside.
    row = tl.minimum(tl.maximum(tl.load(ids_ptr + tl.program_id(0)), 0), rows - 1)
    tile, within = row // 4, (row % 4).to(tl.int32)
    out_at = tl.program_id(0).to(tl.int64) * DEPTH
    words_ptr += tile * GROUPS * GROUP_WORDS
    word = tl.arange(0, ROW_WORDS)[None, None, :]
    for group_at in range(0, GROUPS, BLOCK_GROUPS):
        group = group_at + tl.arange(0, BLOCK_GROUPS)[None, :, None]
        held = group < GROUPS
        at = words_ptr + group * GROUP_WORDS + word  # [1, GROUPS, 16]
        rests = tl.load(at + within * ROW_WORDS, mask=held, other=0)
        codes = tl.load(at + CODE_WORDS + within // 2 * ROW_WORDS, mask=held, other=0)
        even, odd = weight_pairs(rests, codes >> (within % 2 * 4), low, high, WINDOW)
        column = group * 64 + columns_of(word)
        store_four(out_ptr, out_at, even, odd, column, held, DEPTH)
    tl.debug_barrier()  # what escapes overwrite is there
    begin, end = tl.load(starts_ptr + tile), tl.load(starts_ptr + tile + 1)
    bytes_ptr += tile * GROUPS * (GROUP_WORDS * 4)
    for upto in range(begin, end, ESCAPES):
        index = upto + tl.arange(0, ESCAPES)
        escape = tl.load(escapes_ptr + index, mask=index < end, other=0)
        its_group, its_column = escape >> 16, (escape >> 8) & 63
        mine = (index < end) & (((escape >> 14) & 3) == within)
        rest_at = its_group * (GROUP_WORDS * 4) + within * 64 + place_of(its_column)
        rest = tl.load(bytes_ptr + rest_at, mask=mine, other=0).to(tl.int32)
        to = out_at + its_group * 64 + its_column
        tl.store(out_ptr + to, bits_of(rest, escape & 255).to(tl.int16), mask=mine)


Arguments = dict[str, torch.Tensor | int]
Constants = dict[str, int | bool]


def parts_of(matrix: ResidentMatrix) -> tuple[Arguments, Constants]:
    """What every kernel takes of ``matrix``, and what is known of it when one is compiled.

    Raises:
        ValueError: its parts do not fit each other.
    """
    rows, columns = matrix.shape
    shape = (tile_count(rows), group_count(columns), GROUP_BYTES)
    require(
        matrix.tiles.shape == shape
        and matrix.tiles.dtype is torch.uint8
        and matrix.starts.shape == (shape[0] + 1,)
        and matrix.starts.dtype is matrix.escapes.dtype is torch.int32
        and all(t.is_contiguous() for t in (matrix.tiles, matrix.starts, matrix.escapes))
        and matrix.tiles.data_ptr() % 16 == 0
        and matrix.palette.device.type == "cpu",  # it is read while launches are queued
        *("resident matrix", matrix.tiles, matrix.starts, matrix.escapes, matrix.palette),
    )
    shown = bytes(matrix.palette.tolist())
    low, high = (int.from_bytes(part, "little", signed=True) for part in (shown[:8], shown[8:]))
    arguments: Arguments = {
        "words_ptr": matrix.tiles.view(-1).view(torch.int32),
        "bytes_ptr": matrix.tiles,
        "starts_ptr": matrix.starts,
        "escapes_ptr": matrix.escapes,
        "low": low,
        "high": high,
    }
    window = shown == bytes(range(shown[0], min(shown[0] + PALETTE, 256)))
    return arguments, {"DEPTH": columns, "GROUPS": shape[1], "WINDOW": window}


def plan_unpack(matrix: ResidentMatrix, first_row: int, out: torch.Tensor) -> Launch:
    """Rows [first_row, first_row + n) of ``matrix``, bit by bit, into ``out`` [n, K] bfloat16.

    Args:
        first_row: a multiple of 4.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    end_row = first_row + len(out)
    require(
        out.dtype is torch.bfloat16
        and out.dim() == 2
        and out.shape[1] == matrix.shape[1]
        and out.is_contiguous()
        and out.data_ptr() % 16 == 0
        and first_row % TILE_ROWS == 0
        and 0 <= first_row <= end_row <= matrix.shape[0],
        *("resident_unpack", matrix.tiles, out),
    )
    first_tile, end_tile = first_row // TILE_ROWS, tile_count(end_row)
    groups = group_count(matrix.shape[1])
    grid = (ceil_div(end_tile - first_tile, UNPACK_TILES), ceil_div(groups, UNPACK_GROUPS))
    arguments, constants = parts_of(matrix)
    arguments |= {
        "out_ptr": out.view(torch.int16),
        "first_tile": first_tile,
        "end_tile": end_tile,
        "end_row": end_row,
    }
    return Launch(
        resident_unpack_kernel,
        grid,
        arguments,
        constants | {"TILES": UNPACK_TILES, "BLOCK_GROUPS": UNPACK_GROUPS, "ESCAPES": ESCAPES},
        warps=4,
    )


def plan_rows(matrix: ResidentMatrix, ids: torch.Tensor, out: torch.Tensor) -> Launch:
    """Rows ``ids`` [T] int64 of ``matrix``, bit by bit, into ``out`` [T, K] bfloat16.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit, or there is no row.
    """
    require(
        out.dtype is torch.bfloat16
        and out.shape == (len(ids), matrix.shape[1])
        and out.is_contiguous()
        and out.data_ptr() % 16 == 0
        and ids.dtype is torch.int64
        and ids.is_contiguous()
        and matrix.shape[0] > 0,
        *("resident_rows", matrix.tiles, ids, out),
    )
    arguments, constants = parts_of(matrix)
    arguments |= {"ids_ptr": ids, "out_ptr": out.view(torch.int16), "rows": matrix.shape[0]}
    return Launch(
        resident_rows_kernel,
        (len(ids),),
        arguments,
        constants | {"BLOCK_GROUPS": ROW_GROUPS, "ESCAPES": ESCAPES},
        warps=2,
    )
