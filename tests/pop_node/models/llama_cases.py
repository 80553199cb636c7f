"""Shared by the model tests: a tiny random Llama, and batches over its cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig as HfConfig
from transformers import LlamaForCausalLM

from kernels.meta import AttentionMeta
from pop_node.models.llama import Llama

BLOCK_TOKENS = 4
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


def tiny_transformers_llama(**changes: Any) -> LlamaForCausalLM:
    """A random model of 3 layers, 6 query heads on 2 KV heads, 20 wide: nothing divides 16."""
    torch.manual_seed(5)
    config = HfConfig(
        **{
            "vocab_size": 131,
            "hidden_size": 60,
            "intermediate_size": 90,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.15,
            "tie_word_embeddings": True,
            "attn_implementation": "eager",
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def hf_logits(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """Transformers' logits of every position: [len(ids), vocab] float32."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


@dataclass
class Sequences:
    """Sequences of token ids over one cache, with blocks handed out in a scrambled order."""

    model: Llama
    num_blocks: int = 128
    cache: tuple[torch.Tensor, ...] = field(init=False)
    ids: list[list[int]] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = self.model.allocate_cache(self.num_blocks, BLOCK_TOKENS)
        for component in self.cache:
            component.fill_(float("nan"))
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(1))
        self._free = order.tolist()

    def new(self) -> int:
        """Number of a new, empty sequence."""
        self.ids.append([])
        self.tables.append([])
        return len(self.ids) - 1

    def step(self, new_ids: dict[int, list[int]], **forward: Any) -> dict[int, torch.Tensor]:
        """Append tokens to sequences in one batch; logits [new tokens, vocab] of each."""
        slots: list[int] = []
        positions: list[int] = []
        for sequence, ids in new_ids.items():
            table = self.tables[sequence]
            for token in ids:
                position = len(self.ids[sequence])
                if position % BLOCK_TOKENS == 0:
                    table.append(self._free.pop())
                slots.append(table[-1] * BLOCK_TOKENS + position % BLOCK_TOKENS)
                positions.append(position)
                self.ids[sequence].append(token)
        queries = [len(ids) for ids in new_ids.values()]
        contexts = [len(self.ids[sequence]) for sequence in new_ids]
        tables = torch.zeros(len(queries), 64, dtype=torch.int32)
        for row, sequence in enumerate(new_ids):
            table = self.tables[sequence]
            tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        starts = torch.tensor([0, *queries]).cumsum(0).int()
        meta = AttentionMeta(
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_starts=starts,
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=tables,
            block_tokens=BLOCK_TOKENS,
            max_query=max(queries),
            max_context=max(contexts),
            query_lens_host=queries,
            context_lens_host=contexts,
        )
        flat = torch.tensor([token for ids in new_ids.values() for token in ids])
        rows = torch.arange(len(flat))
        # Kept beyond the next step, whose logits may come in the same memory.
        logits = self.model.forward(flat, meta, self.cache, rows, **forward).clone()
        return dict(zip(new_ids, logits.split(queries), strict=True))
