"""Matrix products with weights stored as ``[out, in]``, accumulated in float32."""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` [T, K] times ``weight`` [N, K]^T, plus ``bias`` [N]: [T, N] in the dtype of ``x``."""
    product = x.float() @ weight.float().T
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype)


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x`` [S, H] times ``weight`` [V, H]^T, left in float32: [S, V]."""
    return x.float() @ weight.float().T
