"""Products with resident weights, decoded on their way to the multiplier: no scratch memory.

``plan_product`` computes x [T, K] times w [N, K]^T in float32 sums. One row of x: a program decodes
8 rows of w and multiplies in float32 lanes, every thread its columns in order of k, then a tree of
the threads. More rows: a program decodes 32 rows of w and multiplies on tensor cores in order of k.
That kernel's sums depend on neither the number of rows nor a row's neighbours, so alone it is
batch-invariant: its tile is 16 rows of x wide, or 64 from 17 rows on, by the same instructions
(``mma.m16n8k16``) in the same order.

Escapes have the code 0, whose exponent is known: their products are put right once everything else
is summed, ``true x - coded x``, which rounds like any other term. An x that is not finite makes of
an escape in its column NaN where infinity would have been right.

Roofline: 1.5 bytes a weight for 2, so 1.33 times cuBLAS's bfloat16 where both wait for memory. One
row: 5.6 instructions a weight (``kernels.triton.compiled``), 2.8 of them of the kind that an H200
does 15 T/s of, 5.3 T weights/s; its 4.8 TB/s bring 3.2 T. Not measured on a device yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.resident import ResidentMatrix, group_count, tile_count
from kernels.triton.launch import Launch, ceil_div, require
from kernels.triton.resident_form import (
    CODE_WORDS,
    ESCAPES,
    GROUP_WORDS,
    ROW_WORDS,
    bits_of,
    columns_of,
    parts_of,
    place_of,
    weight_pairs,
)

VECTOR_TILES, VECTOR_GROUPS = 2, 16
"""Of a program with one row of x: 512 programs for 4,096 outputs, four to a multiprocessor of an
H200. A thread of its four warps has 16 bytes of each row of a tile under way at once. Guess."""

DOT_TILES, DOT_WARPS, DOT_STAGES = 8, 8, 3
"""With more rows: 32 rows of w make 128 programs for 4,096 outputs, one to a multiprocessor, so it
has eight warps. Guess."""

FEW_ROWS, FEW_GROUPS = 16, 8
"""Rows of x in a tile of tensor cores, and groups of w decoded in a turn of the loop: 24 KiB, two
turns ahead, are what a multiprocessor must have under way at 4.8 TB/s and some 700 ns, twice."""

MANY_ROWS, MANY_GROUPS = 64, 4
"""Likewise where there are more rows: what x takes of shared memory decides."""


@triton.jit
def float_of(bits):
    """float32 of the bfloat16 in the low half of a word."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def upper_float(bits):
    """float32 of the bfloat16 in the high half of a word."""
    return (bits & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def multiply_row(total, rests, codes, x0, x1, x2, x3, low, high, WINDOW: tl.constexpr):
    """``total`` plus four columns of a row of w times those of x."""
    even, odd = weight_pairs(rests, codes, low, high, WINDOW)
    total = tl.fma(float_of(even), x0, total)
    total = tl.fma(float_of(odd), x1, total)
    total = tl.fma(upper_float(even), x2, total)
    return tl.fma(upper_float(odd), x3, total)


@triton.jit
def escape_weights(rests_ptr, escape, there, low):
    """Of ``escape``: its row in the tile and its column, and the weight and what stands for it in
    the planes, as bits."""
    row, column = (escape >> 14) & 3, (escape >> 8) & 63
    rest_at = (escape >> 16) * (GROUP_WORDS * 4) + row * 64 + place_of(column)
    rest = tl.load(rests_ptr + rest_at, mask=there, other=0).to(tl.int32)
    true, coded = bits_of(rest, escape & 255), bits_of(rest, (low & 255).to(tl.int32))
    return row, (escape >> 16) * 64 + column, true, coded


@triton.jit
def escape_terms(escapes_ptr, rests_ptr, x_ptr, index, end, low):
    """Rows of the escapes at ``index`` < ``end``, and what each is to add to its row's sum."""
    there = index < end
    escape = tl.load(escapes_ptr + index, mask=there, other=0)
    row, column, true, coded = escape_weights(rests_ptr, escape, there, low)
    x = float_of(tl.load(x_ptr + column, mask=there, other=0).to(tl.int32))
    return row, tl.where(there, float_of(true) * x - float_of(coded) * x, 0.0)


@triton.jit(do_not_specialize=["low", "high"])
def resident_vector_kernel(
    words_ptr, bytes_ptr, starts_ptr, escapes_ptr, x_fours_ptr, x_ptr, bias_ptr, out_ptr,
    low, high, rows, tiles,
    DEPTH: tl.constexpr, GROUPS: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_GROUPS: tl.constexpr, ESCAPES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TILES
    number = tl.arange(0, TILES)[:, None, None]
    own = tl.minimum(number, (tiles - 1 - first).to(tl.int32))  # beyond the last: the last again
    word = tl.arange(0, ROW_WORDS)[None, None, :]
    words_ptr += first * GROUPS * GROUP_WORDS
    # Asked for now, wanted at the end: nearly always all escapes of a tile.
    flat_own = tl.minimum(tl.arange(0, TILES), (tiles - 1 - first).to(tl.int32))
    begin = tl.load(starts_ptr + first + flat_own)
    end = tl.load(starts_ptr + first + flat_own + 1)  # [TILES]
    index = begin[:, None] + tl.arange(0, ESCAPES)[None, :]
    rests_ptr = bytes_ptr + (first + flat_own)[:, None] * GROUPS * (GROUP_WORDS * 4)
    its_row, term = escape_terms(escapes_ptr, rests_ptr, x_ptr, index, end[:, None], low)

    total0 = tl.zeros((TILES, BLOCK_GROUPS, ROW_WORDS), dtype=tl.float32)
    total1, total2, total3 = total0, total0, total0
    for group_at in range(0, GROUPS, BLOCK_GROUPS):
        group = group_at + tl.arange(0, BLOCK_GROUPS)[None, :, None]
        at = words_ptr + own * (GROUPS * GROUP_WORDS) + group * GROUP_WORDS + word
        # Those of two words follow one another: 16 bytes.
        x_at = number * 0 + group * 16 + columns_of(word) // 4
        x_at = x_fours_ptr + tl.max_contiguous(tl.multiple_of(x_at, [1, 1, 2]), [1, 1, 2])
        if GROUPS % BLOCK_GROUPS == 0:
            x = tl.load(x_at)  # [TILES, GROUPS, 16]
            codes01, codes23 = tl.load(at + CODE_WORDS), tl.load(at + CODE_WORDS + ROW_WORDS)
            rests0, rests1 = tl.load(at), tl.load(at + ROW_WORDS)
            rests2, rests3 = tl.load(at + 2 * ROW_WORDS), tl.load(at + 3 * ROW_WORDS)
        else:
            held = (group < GROUPS) & (number >= 0)
            x = tl.load(x_at, mask=held, other=0)
            codes01 = tl.load(at + CODE_WORDS, mask=held, other=0)
            codes23 = tl.load(at + CODE_WORDS + ROW_WORDS, mask=held, other=0)
            rests0 = tl.load(at, mask=held, other=0)
            rests1 = tl.load(at + ROW_WORDS, mask=held, other=0)
            rests2 = tl.load(at + 2 * ROW_WORDS, mask=held, other=0)
            rests3 = tl.load(at + 3 * ROW_WORDS, mask=held, other=0)
        x01, x23 = x.to(tl.int32), (x >> 32).to(tl.int32)
        x0, x1, x2, x3 = float_of(x01), upper_float(x01), float_of(x23), upper_float(x23)
        total0 = multiply_row(total0, rests0, codes01, x0, x1, x2, x3, low, high, WINDOW)
        total1 = multiply_row(total1, rests1, codes01 >> 4, x0, x1, x2, x3, low, high, WINDOW)
        total2 = multiply_row(total2, rests2, codes23, x0, x1, x2, x3, low, high, WINDOW)
        total3 = multiply_row(total3, rests3, codes23 >> 4, x0, x1, x2, x3, low, high, WINDOW)

    its_rows = tl.arange(0, 4)[None, None, :]
    right = tl.sum(tl.where(its_row[:, :, None] == its_rows, term[:, :, None], 0.0), axis=1)
    for upto in range(ESCAPES, tl.max(end - begin, axis=0), ESCAPES):
        its_row, term = escape_terms(escapes_ptr, rests_ptr, x_ptr, index + upto, end[:, None], low)
        right += tl.sum(tl.where(its_row[:, :, None] == its_rows, term[:, :, None], 0.0), axis=1)
    # [tile, group, word, row // 2, row % 2]
    every = tl.join(tl.join(total0, total2), tl.join(total1, total3))
    total = tl.sum(every.reshape(TILES, BLOCK_GROUPS * ROW_WORDS, 4), axis=1) + right
    row = (first + tl.arange(0, TILES))[:, None] * 4 + tl.arange(0, 4)[None, :]  # [TILES, 4]
    if BIAS:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def weight(bits, WIDE: tl.constexpr):
    """Bits of bfloat16, in the low half of words, as numbers."""
    if WIDE:
        return float_of(bits)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def four_weights(rests, codes, low, high, WINDOW: tl.constexpr, WIDE: tl.constexpr):
    """[..., 2, 2]: the four weights of each word, in order of columns."""
    even, odd = weight_pairs(rests, codes, low, high, WINDOW)
    evens = tl.join(weight(even, WIDE), weight(even >> 16, WIDE))
    odds = tl.join(weight(odd, WIDE), weight(odd >> 16, WIDE))
    return tl.join(evens, odds)


@triton.jit(do_not_specialize=["low", "high", "x_rows"])
def resident_dot_kernel(
    words_ptr, bytes_ptr, starts_ptr, escapes_ptr, x_ptr, bias_ptr, out_ptr,
    low, high, x_rows, rows, tiles, x_stride,
    DEPTH: tl.constexpr, GROUPS: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_X: tl.constexpr, TILES: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    ESCAPES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TILES
    own = tl.minimum(tl.arange(0, TILES), (tiles - 1 - first).to(tl.int32))
    word = tl.arange(0, ROW_WORDS)[None, None, :]
    x_row = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    # Rows behind the last read the last one's numbers, and store nothing.
    x_at = tl.minimum(x_row, x_rows - 1).to(tl.int64) * x_stride
    k = tl.arange(0, BLOCK_GROUPS * 64)
    words_ptr += first * GROUPS * GROUP_WORDS
    total = tl.zeros((TILES * 4, BLOCK_X), dtype=tl.float32)
    for group_at in range(0, GROUPS, BLOCK_GROUPS):
        group = group_at + tl.arange(0, BLOCK_GROUPS)[None, :, None]
        at = words_ptr + (own * (GROUPS * GROUP_WORDS))[:, None, None]
        at += group * GROUP_WORDS + word  # [TILES, GROUPS, 16]
        x_column = group_at * 64 + k
        x_from = x_ptr + x_at[None, :] + x_column[:, None]
        if GROUPS % BLOCK_GROUPS == 0:
            x = tl.load(x_from)  # [K, X]
            codes01, codes23 = tl.load(at + CODE_WORDS), tl.load(at + CODE_WORDS + ROW_WORDS)
            rests0, rests1 = tl.load(at), tl.load(at + ROW_WORDS)
            rests2, rests3 = tl.load(at + 2 * ROW_WORDS), tl.load(at + 3 * ROW_WORDS)
        else:
            x = tl.load(x_from, mask=(x_column < GROUPS * 64)[:, None], other=0.0)
            held = (group < GROUPS) & (own >= 0)[:, None, None]
            codes01 = tl.load(at + CODE_WORDS, mask=held, other=0)
            codes23 = tl.load(at + CODE_WORDS + ROW_WORDS, mask=held, other=0)
            rests0 = tl.load(at, mask=held, other=0)
            rests1 = tl.load(at + ROW_WORDS, mask=held, other=0)
            rests2 = tl.load(at + 2 * ROW_WORDS, mask=held, other=0)
            rests3 = tl.load(at + 3 * ROW_WORDS, mask=held, other=0)
        upper = tl.join(
            four_weights(rests0, codes01, low, high, WINDOW, WIDE),
            four_weights(rests2, codes23, low, high, WINDOW, WIDE),
        )
        lower = tl.join(
            four_weights(rests1, codes01 >> 4, low, high, WINDOW, WIDE),
            four_weights(rests3, codes23 >> 4, low, high, WINDOW, WIDE),
        )
        # [tile, group, word, column // 2, column % 2, row // 2, row % 2], where of a word's bits
        # the middle one is its column's highest
        both = tl.join(upper, lower).reshape(TILES, BLOCK_GROUPS, 4, 2, 2, 2, 2, 2, 2)
        both = both.permute(0, 7, 8, 1, 3, 2, 4, 5, 6).reshape(TILES * 4, BLOCK_GROUPS * 64)
        if WIDE:
            x = x.to(tl.float32)
        total = tl.dot(both, x, total, input_precision="ieee")

    # The same for columns that escapes have, with the weights that are wanted there and without
    # those that were multiplied.
    begin = tl.load(starts_ptr + first)
    end = tl.load(starts_ptr + tl.minimum(first + TILES, tiles))
    row_start = tl.load(starts_ptr + first + own)  # [TILES]
    row = tl.arange(0, TILES * 4)
    for upto in range(begin, end, ESCAPES):
        index = upto + tl.arange(0, ESCAPES)
        there = index < end
        escape = tl.load(escapes_ptr + index, mask=there, other=0)
        tile = tl.sum((row_start[None, :] <= index[:, None]).to(tl.int32), axis=1) - 1
        tile = tl.minimum(tile, (tiles - 1 - first).to(tl.int32))
        rests_ptr = bytes_ptr + (first + tile) * GROUPS * (GROUP_WORDS * 4)
        its_row, its_column, true, coded = escape_weights(rests_ptr, escape, there, low)
        x = tl.load(
            x_ptr + x_at[None, :] + its_column[:, None], mask=there[:, None], other=0.0
        )  # [ESCAPES, X]
        if WIDE:
            x = x.to(tl.float32)
        own_row = (row[:, None] == (tile * 4 + its_row)[None, :]) & there[None, :]
        wanted = weight(tl.where(own_row, true[None, :], 0), WIDE)  # [TILES * 4, ESCAPES]
        unwanted = weight(tl.where(own_row, (coded ^ 0x8000)[None, :], 0), WIDE)
        total = tl.dot(unwanted, x, total, input_precision="ieee")
        total = tl.dot(wanted, x, total, input_precision="ieee")
    row = first * 4 + row
    if BIAS:
        bias = tl.load(bias_ptr + row, mask=row < rows, other=0.0)
        total += bias.to(tl.float32)[:, None]
    held = (row < rows)[:, None] & (x_row < x_rows)[None, :]
    out_at = out_ptr + x_row.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=held)


def plan_product(
    x: torch.Tensor,
    matrix: ResidentMatrix,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    batch_invariant: bool = False,
) -> Launch:
    """``x`` [T, K] bfloat16 times ``matrix`` [N, K]^T plus ``bias`` [N] into ``out`` [T, N].

    Args:
        x: where K is no multiple of 64, with columns of zeros up to the next one.
        out: bfloat16 or float32.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    x_rows, depth = x.shape
    rows, columns = matrix.shape
    require(
        x.dtype is torch.bfloat16
        and depth == group_count(columns) * 64 > 0
        and x.is_contiguous()
        and x.data_ptr() % 8 == 0
        and (bias is None or (bias.shape == (rows,) and bias.is_contiguous()))
        and out.shape == (x_rows, rows)
        and out.is_contiguous()
        and out.dtype in (torch.bfloat16, torch.float32),
        *("resident product", x, matrix.tiles, out),
    )
    arguments, constants = parts_of(matrix)
    tiles = tile_count(rows)
    arguments |= {
        "bias_ptr": x if bias is None else bias,
        "out_ptr": out,
        "rows": rows,
        "tiles": tiles,
    }
    constants |= {"BIAS": bias is not None, "ESCAPES": ESCAPES}
    if x_rows == 1 and not batch_invariant:
        return Launch(
            resident_vector_kernel,
            (ceil_div(tiles, VECTOR_TILES),),
            arguments | {"x_fours_ptr": x.view(torch.int64), "x_ptr": x.view(torch.int16)},
            constants | {"TILES": VECTOR_TILES, "BLOCK_GROUPS": VECTOR_GROUPS},
            warps=4,
        )
    few = x_rows <= FEW_ROWS
    block = FEW_ROWS if few else MANY_ROWS
    return Launch(
        resident_dot_kernel,
        (ceil_div(tiles, DOT_TILES), ceil_div(x_rows, block)),
        arguments | {"x_ptr": x, "x_rows": x_rows, "x_stride": depth},
        constants
        | {
            "WIDE": x.device.type == "cpu",  # interpreted, where bfloat16 cannot be multiplied
            "BLOCK_X": block,
            "TILES": DOT_TILES,
            "BLOCK_GROUPS": FEW_GROUPS if few else MANY_GROUPS,
        },
        warps=DOT_WARPS,
        stages=DOT_STAGES,
    )
