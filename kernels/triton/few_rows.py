"""Products of a few rows with a whole matrix, ``[out, in]``: what a decode step of few sequences
is.

    out = x w^T                                           accumulated in float32, rounded once
    out = silu_mul(round(x w^T))                          GATED: w holds gates, then as many ups

A program takes some rows of the matrix and walks along k. Each thread keeps one sum of its own for
each of them until the end, so between loads nothing waits for another thread, and each element of
the matrix is widened once for all rows of x. With gates, a program has rows of gates and the ups
that belong to them in turn, so that the product of both never goes to memory; it is rounded as if
it did.

Roofline: N K elements read once, 2 T FLOPs for each: memory bound. At 4.3 TB/s a multiprocessor has
some 14 instructions for each element of bfloat16, of which this takes 2 + T. Loads of a thread are
16 bytes, eight of them before the first is used, so that programs with 4,096 outputs have 60 KB
under way on each multiprocessor, where 4.3 TB/s and 0.8 us ask for 26; and all of them are there at
once (``kernels.triton.compiled``): a few that came behind the others would be as long again, alone
on the device. Not measured on a device yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.resident import Weight
from kernels.triton.activation import gated
from kernels.triton.launch import Launch, ceil_div, power_of_2, require, same_dtype
from kernels.triton.overlap import ask_ahead, await_turn

FEW_ROWS = 4
"""Of x. Beyond, tensor cores have to do it (see the roofline). Guess."""

WARPS = 4
PASS_ELEMENTS = WARPS * 32 * 8
"""Elements of the matrix that the threads of a program load at once, 16 bytes of bfloat16 each."""

MAX_LINES = 8
"""Rows of the matrix in a program, where a pass takes less than a row: eight loads of a thread."""

CACHE_LINE = tl.constexpr(64)
"""Elements of bfloat16 in 128 bytes; of float32 in two lines, of which one is asked for ahead."""

MIN_BLOCK_K = CACHE_LINE.value

PROGRAMS = 512
"""At least, where the matrix has the rows: nearly four for each of 132 multiprocessors. Guess."""


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x_ptr, w_ptr, out_ptr, rows, columns, x_stride, out_stride,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FOLD: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    line = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = line < columns
    w_row = tl.minimum(line, columns - 1)
    if GATED:
        w_row = w_row % 2 * (columns // 2) + w_row // 2
    w_at = w_ptr + w_row.to(tl.int64)[:, None] * DEPTH
    if OVERLAP and DEPTH % BLOCK_K == 0:
        ask_ahead(w_at + (tl.arange(0, BLOCK_K // CACHE_LINE) * CACHE_LINE)[None, :])
    await_turn(OVERLAP)
    k = tl.arange(0, BLOCK_K)
    # Rows behind the last are the last one, and are not stored.
    x1_ptr = x_ptr + tl.minimum(1, rows - 1).to(tl.int64) * x_stride
    x2_ptr = x_ptr + tl.minimum(2, rows - 1).to(tl.int64) * x_stride
    x3_ptr = x_ptr + tl.minimum(3, rows - 1).to(tl.int64) * x_stride
    sum0 = tl.zeros((BLOCK_N, BLOCK_K // FOLD), dtype=tl.float32)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    for at in tl.range(0, DEPTH, BLOCK_K, loop_unroll_factor=UNROLL):
        here = at + k
        there = here < DEPTH
        if DEPTH % BLOCK_K == 0:
            w = tl.load(w_at + here[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(w_at + here[None, :], mask=there[None, :], other=0.0)
        # Asked for together with w: what is used sooner is waited for sooner.
        x0 = x_part(x_ptr, here, there, DEPTH % BLOCK_K == 0)
        if ROWS > 1:
            x1 = x_part(x1_ptr, here, there, DEPTH % BLOCK_K == 0)
        if ROWS > 2:
            x2 = x_part(x2_ptr, here, there, DEPTH % BLOCK_K == 0)
            x3 = x_part(x3_ptr, here, there, DEPTH % BLOCK_K == 0)
        w = w.to(tl.float32)  # [N, K]
        sum0 += folded(w, x0, BLOCK_N, BLOCK_K, FOLD)
        if ROWS > 1:
            sum1 += folded(w, x1, BLOCK_N, BLOCK_K, FOLD)
        if ROWS > 2:
            sum2 += folded(w, x2, BLOCK_N, BLOCK_K, FOLD)
            sum3 += folded(w, x3, BLOCK_N, BLOCK_K, FOLD)
    write(out_ptr, line, held, tl.sum(sum0, axis=1), GATED, BLOCK_N)
    if ROWS > 1:
        own = held & (rows > 1)
        write(out_ptr + out_stride, line, own, tl.sum(sum1, axis=1), GATED, BLOCK_N)
    if ROWS > 2:
        own = held & (rows > 2)
        write(out_ptr + 2 * out_stride, line, own, tl.sum(sum2, axis=1), GATED, BLOCK_N)
        own = held & (rows > 3)
        write(out_ptr + 3 * out_stride, line, own, tl.sum(sum3, axis=1), GATED, BLOCK_N)


@triton.jit
def x_part(x_ptr, here, there, WHOLE: tl.constexpr):
    """Elements ``here`` of a row of x: [K]."""
    if WHOLE:
        return tl.load(x_ptr + here)
    return tl.load(x_ptr + here, mask=there, other=0.0)


@triton.jit
def folded(w, x, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FOLD: tl.constexpr):
    """Products of w [N, K] and x [K], FOLD neighbours in one sum: [N, K / FOLD]."""
    products = w * x.to(tl.float32)[None, :]
    return tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_K // FOLD, FOLD)), axis=2)


@triton.jit
def write(out_ptr, line, held, total, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a row's sums [N], or what its gates let through: [N / 2]."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if GATED:
        rounded = total.to(dtype).to(tl.float32)
        gate, up = tl.split(tl.reshape(rounded, (BLOCK_N // 2, 2)))
        place, _ = tl.split(tl.reshape(line // 2, (BLOCK_N // 2, 2)))
        inside, _ = tl.split(tl.reshape(held.to(tl.int32), (BLOCK_N // 2, 2)))
        tl.store(out_ptr + place, gated(gate, up).to(dtype), mask=inside != 0)
    else:
        tl.store(out_ptr + line, total.to(dtype), mask=held)


def plan_few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    gate: bool,
    most_lines: int = MAX_LINES,
) -> Launch:
    """``x`` [T, K] times ``weight`` [N, K]^T into ``out`` [T, N] of any dtype, or, with ``gate``,
    what the first half of N lets through of the second, in the dtype of ``x``: [T, N / 2].

    Args:
        most_lines: rows of the matrix in a program; benchmarks try others.

    Raises:
        ValueError: shapes or dtypes do not fit, or there are more than ``FEW_ROWS`` rows.
    """
    rows, depth = x.shape
    columns = weight.shape[0]
    require(
        fits(x, weight)
        and weight.shape[1] == depth > 0
        and out.is_contiguous()
        and out.shape == (rows, columns // 2 if gate else columns)
        and (not gate or (columns % 2 == 0 and out.dtype is x.dtype)),
        "few_rows",
        *(x, weight, out),
    )
    held = power_of_2(rows)
    block_k = min(PASS_ELEMENTS, depth & -depth)
    if block_k < MIN_BLOCK_K:
        block_k = min(PASS_ELEMENTS, power_of_2(depth))
    block_n = max(2 if gate else 1, PASS_ELEMENTS // block_k)
    while 2 * block_n <= most_lines and ceil_div(columns, 2 * block_n) >= PROGRAMS:
        block_n *= 2
    load = 16 // x.element_size()
    return Launch(
        few_rows_kernel,
        (ceil_div(columns, block_n),),
        {
            "x_ptr": x,
            "w_ptr": weight,
            "out_ptr": out,
            "rows": rows,
            "columns": columns,
            "x_stride": x.stride(0),
            "out_stride": out.shape[1],
        },
        {
            "DEPTH": depth,
            "ROWS": held,
            "GATED": gate,
            # More rows of x have more to keep, and as much under way without.
            "UNROLL": 2 if rows == 1 else 1,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            # What a thread has of one load, where loads are whole.
            "FOLD": load if depth % load == 0 else 1,
        },
        WARPS,
    )


def fits(x: torch.Tensor, weight: Weight) -> bool:
    """Whether ``product`` and ``gate_up`` can be asked for ``x`` [T, K] and ``weight`` [N, K]."""
    if not isinstance(weight, torch.Tensor) or not 0 < x.shape[0] <= FEW_ROWS:
        return False
    return x.stride(1) == 1 and weight.is_contiguous() and same_dtype(x, weight)


def product(
    x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, *, overlap: bool = False
) -> torch.Tensor:
    """``x`` [T, K], of at most ``FEW_ROWS``, times ``weight`` [N, K]^T: [T, N] of ``dtype``."""
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    plan_few_rows(x, weight, out, gate=False).run(overlap=overlap)
    return out


def gate_up(x: torch.Tensor, weight: torch.Tensor, *, overlap: bool = False) -> torch.Tensor:
    """``silu_mul(linear(x, weight))`` of at most ``FEW_ROWS`` rows: [T, N / 2]."""
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    plan_few_rows(x, weight, out, gate=True).run(overlap=overlap)
    return out
