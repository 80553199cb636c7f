"""RMS norm: ``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in float32.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise rows of ``x`` [T, H] and scale by ``weight`` [H]; result in the dtype of ``x``."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``x`` to the residual stream and normalise the sum.

    The sum is rounded to the dtype of ``x`` before it is normalised, because the rounded sum is
    what later layers add to.

    Returns:
        (normalised [T, H], new residual [T, H])
    """
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps), total
