"""A pre-norm transformer decoder: grouped-query attention, rotary positions and SwiGLU.

The composition of the other operations, whichever backend they are of. It is the oracle of backends
that compute a decoder as a whole.

Source: Touvron et al., "LLaMA" (2023), section 2.2; "The Llama 3 Herd of Models" (2024),
section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kernels.decoder import DecoderWeights
from kernels.meta import AttentionMeta

if TYPE_CHECKING:
    from kernels.ops import Ops


def decoder(
    ops: Ops,
    weights: DecoderWeights,
    ids: torch.Tensor,
    meta: AttentionMeta,
    cache: tuple[torch.Tensor, ...],
    logit_rows: torch.Tensor,
    on_layer: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Compute one ragged batch, writing the KV of its tokens.

    Args:
        ids: [T] int64 token ids.
        cache: keys and values, each [layers, blocks, block_tokens, kv_heads, head_dim].
        logit_rows: [S] int64: the rows of the batch whose next token is wanted, at most T.
        on_layer: called with i as soon as layer i's K and V of this batch are in the cache.

    Returns:
        [S, vocab] float32 logits. A backend may hand out the same memory at the next call.
    """
    w = weights
    heads = [w.heads, w.kv_heads, w.kv_heads]
    keys, values = (component.unbind(0) for component in cache)
    x = ops.embed(w.embedding, ids)  # [T, H]
    residual = torch.zeros_like(x)
    for i, layer in enumerate(w.layers):
        x, residual = ops.add_rms_norm(x, residual, layer.attention_norm, w.norm_eps)
        qkv = ops.linear(x, layer.qkv, None).view(len(ids), sum(heads), w.head_dim)
        q, k, v = torch.split(qkv, heads, dim=1)
        ops.rope_kv_write(q, k, v, w.cos_sin, meta, keys[i], values[i])
        if on_layer is not None:
            on_layer(i)
        attended = ops.attention(q, keys[i], values[i], meta, w.scale)
        x = ops.linear(attended.flatten(1), layer.output, None)
        x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, w.norm_eps)
        if ops.gate_up is None:
            x = ops.silu_mul(ops.linear(x, layer.gate_up, None))
        else:
            x = ops.gate_up(x, layer.gate_up)
        x = ops.linear(x, layer.down, None)
    x, _ = ops.add_rms_norm(x[logit_rows], residual[logit_rows], w.final_norm, w.norm_eps)
    return ops.logits(x, w.head)
