"""Matrix products with weights stored as ``[out, in]``, accumulated in float32.

Weights may have the resident form (``kernels.resident``): the product is that of the same bits.
"""

from __future__ import annotations

import torch

from kernels.reference.resident import dense
from kernels.resident import Weight


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` [T, K] times ``weight`` [N, K]^T, plus ``bias`` [N]: [T, N] in the dtype of ``x``."""
    product = x.float() @ dense(weight).float().T
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype)


def logits(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """``x`` [S, H] times ``weight`` [V, H]^T, left in float32: [S, V]."""
    return x.float() @ dense(weight).float().T
