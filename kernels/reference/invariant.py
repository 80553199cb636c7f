"""The operations whose last bits depend on the batch in plain torch, in an order that is fixed.

Torch picks the order of a sum, and vector or scalar code for ``exp``, by the shape of the whole
batch. Here everything is made of operations that IEEE 754 rounds exactly (+, -, x, /, square root,
comparison), applied element by element, and sums fold in halves: a row's bits are a function of
that row and the weights, and of a query's position and the keys up to it; whatever the batch, the
threads and the processor. The price is speed: use it where no compiler is at hand, or as an oracle.

Shapes and meaning as in the modules of the same operations.
"""

from __future__ import annotations

import torch

from kernels.meta import AttentionMeta
from kernels.reference.attention import gather
from kernels.reference.resident import dense
from kernels.resident import Weight

# Elements of a slab of weights and its products, which should stay in a cache; decides no bits.
# Measured on Zen 5: half is half again as slow, four times as much a quarter faster.
SLAB_ELEMENTS = 1 << 18

_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # n times the first is exact for |n| < 2^14


def fold_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis: the upper half is added to the lower until one is left."""
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        folded = x[..., :half].clone()
        folded[..., : n - half] += x[..., half:]
        x = folded
    return x[..., 0]


def exp(x: torch.Tensor) -> torch.Tensor:
    """e^x of float32 ``x`` <= 88; 0 below -87, where the result would be no normal number.

    x = n ln 2 + r; Taylor's series in r up to r^7, then n goes into the exponent. Relative error
    below 3e-7.
    """
    clamped = x.clamp(min=-87.0)
    n = torch.round(clamped * 1.44269504)
    r = clamped - n * _LN2_HIGH - n * _LN2_LOW
    series = torch.full_like(r, 1.0 / 5040)
    for coefficient in (1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
        series = series * r + coefficient
    power = ((n.int() + 127) << 23).view(torch.float32)  # 2^n
    return torch.where(x < -87.0, 0.0, series * power)


def product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """``x`` [T, K] times ``weight`` [N, K]^T in float32: [T, N]."""
    rows, depth = x.shape
    out = torch.empty(rows, weight.shape[0], dtype=torch.float32)
    wide = x.float()
    at = 0
    for slab in torch.split(dense(weight), max(1, SLAB_ELEMENTS // depth)):
        columns = slice(at, at + slab.shape[0])
        slab = slab.float()
        for row in range(rows):
            out[row, columns] = fold_sum(slab * wide[row])
        at = columns.stop
    return out


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """See ``kernels.reference.linear.linear``."""
    out = product(x, weight)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``kernels.reference.norm.rms_norm``."""
    wide = x.float()
    mean = fold_sum(wide * wide)[:, None] / x.shape[1]
    # Vector libraries may miss the last bit of a square root. No square root of a float32 lies so
    # near the middle of two that an error of the last bit of a float64 could cross it.
    root = torch.sqrt((mean + eps).double()).float()
    return (wide / root * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``kernels.reference.norm.add_rms_norm``."""
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See ``kernels.reference.activation.silu_mul``."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    # x / (1 + e^-x), with the exponential of a number that is never positive.
    small = exp(-gate.abs())
    sigmoid = torch.where(gate < 0, small, 1.0) / (1.0 + small)
    return (gate * sigmoid * up).to(gate_up.dtype)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    meta: AttentionMeta,
    scale: float,
) -> torch.Tensor:
    """See ``kernels.reference.attention.attention``; each query by itself, with what it sees."""
    out = torch.empty(q.shape, dtype=q.dtype)
    group = q.shape[1] // k_cache.shape[2]
    row = 0
    for sequence, queries in enumerate(meta.query_lens_host):
        context = meta.context_lens_host[sequence]
        table = meta.block_tables[sequence]
        keys = gather(k_cache, table, context).repeat_interleave(group, dim=1)
        values = gather(v_cache, table, context).repeat_interleave(group, dim=1)
        for seen in range(context - queries + 1, context + 1):
            scores = fold_sum(q[row].float() * keys[:seen]).T * scale  # [Hq, seen]
            weights = exp(scores - scores.amax(dim=-1, keepdim=True))
            weights = weights / fold_sum(weights)[:, None]
            # [Hq, D, seen]: the sum runs over the keys.
            out[row] = fold_sum(weights[:, None] * values[:seen].permute(1, 2, 0)).to(q.dtype)
            row += 1
    return out
