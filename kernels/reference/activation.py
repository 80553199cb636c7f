"""SwiGLU's gate: ``silu(gate) * up`` with ``silu(x) = x / (1 + e^-x)``.

Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.
"""

from __future__ import annotations

import torch


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``gate_up`` [T, 2 I], gates first: [T, I] in its dtype, computed in float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
