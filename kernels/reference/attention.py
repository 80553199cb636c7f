"""Causal attention of a ragged batch over a paged KV cache.

For each sequence: ``softmax(scale * q k^T + mask) v`` in float32. Query head h reads KV head
``h // (Hq / Hk)`` (grouped-query attention). A query sees its own position and all before it, as
far as the layer's reach goes: the last ``window`` positions, its own included, or those of its own
chunk, where position p is in chunk ``p // chunk``.

Source: Vaswani et al. (2017), section 3.2; Ainslie et al., "GQA" (2023); Beltagy et al.,
"Longformer" (2020), section 3.1, for windows.
"""

from __future__ import annotations

import torch

from kernels.meta import AttentionMeta


def gather(cache: torch.Tensor, table: torch.Tensor, tokens: int) -> torch.Tensor:
    """The first ``tokens`` entries of one sequence: [tokens, Hk, D] float32.

    ``cache`` is one layer's [blocks, block_tokens, Hk, D], ``table`` the sequence's block numbers.
    """
    used = -(-tokens // cache.shape[1])
    return cache[table[:used].long()].flatten(0, 1)[:tokens].float()


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    meta: AttentionMeta,
    scale: float,
    *,
    window: int | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Attend with ``q`` [T, Hq, D] (rotated) over the cache, whose slots already hold these tokens.

    Args:
        window: positions that a query sees, at least 1; None: all before it.
        chunk: positions of a chunk, at least 1; None: one chunk holds all.

    Returns:
        [T, Hq, D] in the dtype of ``q``.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // k_cache.shape[2]
    row = 0
    for sequence, queries in enumerate(meta.query_lens_host):
        context = meta.context_lens_host[sequence]
        table = meta.block_tables[sequence]
        keys = gather(k_cache, table, context).repeat_interleave(group, dim=1)
        values = gather(v_cache, table, context).repeat_interleave(group, dim=1)
        rows = slice(row, row + queries)
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * scale
        position = torch.arange(context - queries, context, device=q.device)[:, None]
        key = torch.arange(context, device=q.device)[None, :]
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        if chunk is not None:
            hidden |= key // chunk != position // chunk
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
        row += queries
    return out
