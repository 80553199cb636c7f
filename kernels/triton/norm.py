"""RMS norm of rows, with or without the addition to the residual stream before it.

    total = round(x + residual)                                     in the dtype of x
    out = total / sqrt(mean(total^2) + eps) * weight                float32, rounded once

One program per row, which it holds in registers: one pass over memory. A row's sum has an order
that follows from the row's length alone, so its bits do not depend on the batch.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.

Roofline: T H elements read and written once, twice with a residual (8 T H bytes in bfloat16), about
4 FLOPs each: memory bound. Not measured on a device yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launch, power_of_2, require, same_dtype
from kernels.triton.overlap import await_turn

MAX_HIDDEN = 1 << 15
"""Elements of a row: 1,024 threads hold 32 each."""

ELEMENTS_PER_WARP = 512
"""16 per thread: two 16-byte loads of bfloat16. Guess."""


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, hidden, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    await_turn(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * hidden
    at = tl.arange(0, BLOCK)
    held = at < hidden
    x = tl.load(x_ptr + row + at, mask=held, other=0.0)  # [BLOCK]
    if ADD:
        residual = tl.load(residual_ptr + row + at, mask=held, other=0.0).to(tl.float32)  # [BLOCK]
    # Asked for with the row: it would come as late again after the sum.
    weight = tl.load(weight_ptr + at, mask=held, other=0.0)  # [BLOCK]
    x = x.to(tl.float32)
    if ADD:
        total = (x + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row + at, total, mask=held)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    out = (x * scale * weight.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row + at, out, mask=held)


def plan_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> Launch:
    """Normalise ``x`` [T, H] into ``out``; with ``residual``, their sum goes to ``total``.

    Raises:
        ValueError: shapes or dtypes do not fit, or a row is longer than ``MAX_HIDDEN``.
    """
    added = x if residual is None else residual
    require(
        x.dim() == 2
        and same_dtype(x, added, weight)
        and added.shape == x.shape
        and weight.shape == (x.shape[1],)
        and 0 < x.shape[1] <= MAX_HIDDEN
        and x.is_contiguous()
        and added.is_contiguous(),
        "rms_norm",
        *(x, added, weight),
    )
    rows, hidden = x.shape
    block = power_of_2(hidden)
    return Launch(
        norm_kernel,
        (rows,),
        {
            "x_ptr": x,
            "residual_ptr": added,
            "weight_ptr": weight,
            "out_ptr": out,
            "total_ptr": out if total is None else total,
            "hidden": hidden,
            "eps": eps,
        },
        {"ADD": residual is not None, "BLOCK": block},
        warps=max(1, min(32, block // ELEMENTS_PER_WARP)),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``kernels.reference.norm.rms_norm``."""
    x = x.contiguous()
    out = torch.empty_like(x)
    plan_norm(x, None, weight, eps, out, None).run()
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    overlap: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.reference.norm.add_rms_norm``."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    plan_norm(x, residual, weight, eps, out, total).run(overlap=overlap)
    return out, total
