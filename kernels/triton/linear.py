"""Matrix products with weights stored as ``[out, in]``, accumulated in float32.

``linear`` and ``logits`` are ``few_rows``, where there are few, or cuBLAS, which picks its kernel,
and with it the order of a sum, by the number of rows. The invariant ones are the kernel here: one
configuration for any number of rows, chosen by the weights' shape alone, every sum in order of k.
So a row's bits depend on that row.

Roofline of the kernel: 2 T N K FLOPs over N K weights; memory bound below about 300 rows of
bfloat16 on an H200 (990 TFLOP/s over 4.8 TB/s are 206 FLOPs per byte). Its cost against cuBLAS has
not been measured on a device yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton import few_rows
from kernels.triton.launch import Launch, ceil_div, require, same_dtype

TILE_COLUMNS = 128
"""Columns of a tile where the weights are wide."""

FEW_COLUMNS = 8192
"""Weights with fewer outputs get tiles of 32 columns, so that 4,096 outputs make 128 programs for
the 132 multiprocessors of an H200 when there is one row. Guess."""

GROUP_ROWS = 8
"""Row tiles that run next to each other share their columns of weights in the L2 cache. Guess."""


@triton.jit(do_not_specialize=["rows"])
def matmul_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, rows, columns, x_stride,
    DEPTH: tl.constexpr, BIAS: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    first = tile // (GROUP_ROWS * column_tiles) * GROUP_ROWS
    height = tl.minimum(row_tiles - first, GROUP_ROWS)
    within = tile % (GROUP_ROWS * column_tiles)
    row = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns behind the last read the last one's numbers, and store nothing.
    x_row = tl.minimum(row, rows - 1).to(tl.int64) * x_stride
    w_row = tl.minimum(column, columns - 1).to(tl.int64) * DEPTH
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for at in range(0, DEPTH, BLOCK_K):
        x_at = x_ptr + x_row[:, None] + (at + k)[None, :]
        w_at = w_ptr + w_row[None, :] + (at + k)[:, None]
        if DEPTH % BLOCK_K == 0:
            x = tl.load(x_at)  # [M, K]
            w = tl.load(w_at)  # [K, N]
        else:
            x = tl.load(x_at, mask=(at + k < DEPTH)[None, :], other=0.0)
            w = tl.load(w_at, mask=(at + k < DEPTH)[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None]
    held = (row < rows)[:, None] & (column < columns)[None, :]
    out_at = out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=held)


def plan_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> Launch:
    """``x`` [T, K] times ``weight`` [N, K]^T plus ``bias`` [N] into ``out`` [T, N], any dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    rows, depth = x.shape
    columns = weight.shape[0]
    added = weight if bias is None else bias
    require(
        weight.shape[1] == depth > 0
        and same_dtype(x, weight, added)
        and (bias is None or bias.shape == (columns,))
        and x.stride(1) == 1
        and weight.is_contiguous()
        and added.is_contiguous()
        and out.shape == (rows, columns)
        and out.is_contiguous(),
        "matmul",
        *(x, weight, added, out),
    )
    if x.element_size() == 4:  # no tensor cores keep float32's precision: tiles in registers
        block_m, block_n, block_k, warps, stages = 32, 32, 32, 4, 2
    else:
        block_m, block_k, warps, stages = 64, 64, 4, 4
        block_n = TILE_COLUMNS if columns >= FEW_COLUMNS else 32
    return Launch(
        matmul_kernel,
        (ceil_div(rows, block_m) * ceil_div(columns, block_n),),
        {
            "x_ptr": x,
            "w_ptr": weight,
            "bias_ptr": added,
            "out_ptr": out,
            "rows": rows,
            "columns": columns,
            "x_stride": x.stride(0),
        },
        {
            "DEPTH": depth,
            "BIAS": bias is not None,
            "GROUP_ROWS": GROUP_ROWS,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        warps,
        stages,
    )


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, overlap: bool = False
) -> torch.Tensor:
    """See ``kernels.reference.linear.linear``."""
    if bias is None and few_rows.fits(x, weight):
        return few_rows.product(x, weight, x.dtype, overlap=overlap)
    return torch.nn.functional.linear(x, weight, bias)


def logits(x: torch.Tensor, weight: torch.Tensor, *, overlap: bool = False) -> torch.Tensor:
    """See ``kernels.reference.linear.logits``."""
    if few_rows.fits(x, weight):
        return few_rows.product(x, weight, torch.float32, overlap=overlap)
    if x.dtype is torch.float32 or not x.is_cuda:
        return x.float() @ weight.float().T
    return torch.mm(x, weight.T, out_dtype=torch.float32)


def invariant_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """See ``kernels.reference.linear.linear``."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    plan_matmul(x, weight, bias, out).run()
    return out


def invariant_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See ``kernels.reference.linear.logits``."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    plan_matmul(x, weight, None, out).run()
    return out
