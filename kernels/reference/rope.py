"""Rotary position embedding, applied while keys and values enter the paged cache.

Element i of the first half of a head pairs with element i of the second half (the layout of
Hugging Face Llama weights): ``(a, b) -> (a cos - b sin, b cos + a sin)``. K is cached after
rotation, so that a cache block means the same on every node.
"""

from __future__ import annotations

import torch

from kernels.meta import AttentionMeta


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` [T, heads, D] by angles whose ``cos`` and ``sin`` are [T, D / 2] float32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rope_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    meta: AttentionMeta,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """Rotate ``q`` [T, Hq, D] and ``k`` [T, Hk, D] in place; write k and ``v`` to ``meta.slots``.

    Args:
        cos_sin: [positions, D] float32: cosines of a position's D / 2 angles, then their sines.
        k_cache: one layer's [blocks, block_tokens, Hk, D]; ``v_cache`` alike.
    """
    cos, sin = cos_sin[meta.positions].chunk(2, dim=-1)
    q.copy_(rotate(q, cos, sin))
    k.copy_(rotate(k, cos, sin))
    k_cache.flatten(0, 1)[meta.slots] = k
    v_cache.flatten(0, 1)[meta.slots] = v
