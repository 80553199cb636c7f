"""A pre-norm decoder as the operations see it: its weights, and what computes a batch of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.meta import AttentionMeta
from kernels.resident import Weight


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights of one layer, ``[out, in]``; projections that share an input are one matrix."""

    attention_norm: torch.Tensor  # [H]
    qkv: Weight  # [(heads + 2 kv_heads) D, H]
    output: Weight  # [H, heads D]
    mlp_norm: torch.Tensor  # [H]
    gate_up: Weight  # [2 I, H]
    down: Weight  # [H, I]


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Weights of a decoder, all of one dtype and on one device, and the constants of its formulas.

    ``scale`` multiplies the attention's scores.
    """

    embedding: Weight  # [vocab, H]
    layers: tuple[DecoderLayer, ...]
    final_norm: torch.Tensor  # [H]
    head: Weight  # [vocab, H]
    cos_sin: torch.Tensor  # [positions, D] float32: cosines of a position's angles, then sines
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    scale: float


class Decoder(Protocol):
    """Computes batches of one decoder; see ``kernels.reference.decoder.decoder``."""

    def __call__(
        self,
        ids: torch.Tensor,
        meta: AttentionMeta,
        cache: tuple[torch.Tensor, ...],
        logit_rows: torch.Tensor,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor: ...
