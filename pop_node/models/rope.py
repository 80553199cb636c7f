"""Rotary angles of a model: the table of cosines and sines, with Llama 3's long-context scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Stretch slow rotations by ``factor``, keep fast ones, blend between.

    Wavelengths (in tokens) above ``original_context / low_freq_factor`` are slow, those below
    ``original_context / high_freq_factor`` fast.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


def inverse_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> torch.Tensor:
    """Radians per token of each of the ``head_dim / 2`` rotations: float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    # How many turns a rotation makes within the original context decides how far it is stretched.
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


@lru_cache(maxsize=1)
def cos_sin_table(
    positions: int, head_dim: int, theta: float, scaling: Llama3Scaling | None
) -> torch.Tensor:
    """[positions, head_dim] float32: cosines of a position's angles, then their sines.

    The last one is kept, and not to be written to.
    """
    frequencies = inverse_frequencies(head_dim, theta, scaling)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
