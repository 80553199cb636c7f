"""Where each token of a batch lives in the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """Layout of one ragged batch of S sequences and T tokens in all; no padding.

    Sequence i owns query rows ``[query_starts[i], query_starts[i+1])`` and, with them, has
    ``context_lens[i]`` tokens; its queries are the last ones of that context (causal). Token p of
    its context lies in slot ``block_tables[i, p // block_tokens] * block_tokens + p %
    block_tokens``.

    Shapes: ``positions`` [T] int64; ``slots`` [T] int64 (where each new token's KV is written);
    ``query_starts`` [S+1] int32; ``context_lens`` [S] int32; ``block_tables`` [S, max_blocks]
    int32, unused entries 0. All on the model's device. ``max_query`` and ``max_context`` are host
    integers; ``query_lens_host`` and ``context_lens_host`` are the same facts as Python lists.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    block_tokens: int
    max_query: int
    max_context: int
    query_lens_host: list[int]
    context_lens_host: list[int]
