"""SwiGLU's gate: ``silu(gate) * up`` with ``silu(x) = x / (1 + e^-x)``, in float32.

Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.

Roofline: 3 T I elements moved (6 T I bytes in bfloat16), about 6 FLOPs per result: memory bound.
Not measured on a device yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launch, ceil_div, power_of_2, require, same_dtype

BLOCK = 1024
"""Results of one program: 8 per thread of 4 warps, one 16-byte access of bfloat16. Guess."""


@triton.jit
def gated(gate, up):
    """``silu(gate) * up`` of float32, with the exponential of a number that is never positive."""
    small = tl.exp(-tl.abs(gate))
    return gate * tl.where(gate < 0, small, 1.0) / (1.0 + small) * up


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = at < width
    line = gate_up_ptr + 2 * row * width
    gate = tl.load(line + at, mask=held, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(line + width + at, mask=held, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(out_ptr + row * width + at, gated(gate, up).to(out_ptr.dtype.element_ty), mask=held)


def plan_silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> Launch:
    """``gate_up`` [T, 2 I] into ``out`` [T, I].

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    require(
        gate_up.dim() == 2
        and gate_up.shape[1] % 2 == 0
        and gate_up.shape[1] > 0
        and same_dtype(gate_up)
        and gate_up.is_contiguous(),
        "silu_mul",
        gate_up,
    )
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    block = min(BLOCK, power_of_2(width))
    return Launch(
        silu_mul_kernel,
        (rows, ceil_div(width, block)),
        {"gate_up_ptr": gate_up, "out_ptr": out, "width": width},
        {"BLOCK": block},
    )


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See ``kernels.reference.activation.silu_mul``."""
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    plan_silu_mul(gate_up, out).run()
    return out
