"""Moves the KV of a span of tokens between the paged cache and one dense piece, for streaming.

A piece is what travels: [layers, tokens, heads, D], layer by layer in order of the tokens. Bits are
copied, never converted.
"""

from __future__ import annotations

import torch


def kv_pack(cache: torch.Tensor, slots: torch.Tensor, layer_lo: int, layer_hi: int) -> torch.Tensor:
    """A piece with the tokens in ``slots`` [n] int64 of the layers [layer_lo, layer_hi).

    ``cache`` is a component's [layers, blocks, block_tokens, heads, D].
    """
    return cache[layer_lo:layer_hi].flatten(1, 2).index_select(1, slots)


def kv_unpack(piece: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, layer_lo: int) -> None:
    """Write ``piece`` [layers, n, heads, D] to ``slots`` [n] of the layers from ``layer_lo`` on.

    No slot may be given twice.
    """
    target = cache[layer_lo : layer_lo + piece.shape[0]].flatten(1, 2)
    target.index_copy_(1, slots, piece)
