"""A case of the kernels' benchmarks: what is run, what it is held against, and if it is right."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402

from kernels.meta import AttentionMeta  # noqa: E402

BLOCK_TOKENS = 16

SEED = 20240607

# As in the tests: |triton - reference| <= atol + rtol |reference|, results being of magnitude 1.
TOLERANCE = {
    torch.float32: (2e-5, 2e-5),
    torch.float16: (1e-3, 2e-3),
    torch.bfloat16: (1e-2, 1.6e-2),
}

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    ``run`` is what is timed, ``pairs`` computes (result, reference) for the check. ``bytes`` and
    ``flops``: what has to be moved and computed at least. ``exact``: bits must agree.
    """

    name: str
    run: Callable[[], Any]
    pairs: Callable[[], Pairs]
    bytes: int
    flops: int
    exact: bool = False


@dataclass(frozen=True)
class Batch:
    """``sequences`` of ``queries`` new tokens at ``context`` tokens each."""

    sequences: int
    queries: int
    context: int

    @property
    def rows(self) -> int:
        return self.sequences * self.queries

    @property
    def visible(self) -> int:
        """Pairs of a query and a key it sees, of one head."""
        before = self.context - self.queries
        return self.sequences * (self.queries * before + self.queries * (self.queries + 1) // 2)

    def __str__(self) -> str:
        return f"{self.sequences} x {self.queries} at {self.context}"


def layout(batch: Batch, device: torch.device, rng: torch.Generator) -> tuple[AttentionMeta, int]:
    """Blocks in random order, and how many there are."""
    width = -(-batch.context // BLOCK_TOKENS)
    blocks = batch.sequences * width
    tables = torch.randperm(blocks, generator=rng).view(batch.sequences, width)
    first = batch.context - batch.queries
    position = torch.arange(first, batch.context).repeat(batch.sequences)
    owner = torch.arange(batch.sequences).repeat_interleave(batch.queries)
    slots = tables[owner, position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
    starts = torch.arange(batch.sequences + 1, dtype=torch.int32) * batch.queries
    contexts = torch.full((batch.sequences,), batch.context, dtype=torch.int32)
    meta = AttentionMeta(
        positions=position.to(device),
        slots=slots.to(device),
        query_starts=starts.to(device),
        context_lens=contexts.to(device),
        block_tables=tables.to(device, torch.int32),
        block_tokens=BLOCK_TOKENS,
        max_query=batch.queries,
        max_context=batch.context,
        query_lens_host=[batch.queries] * batch.sequences,
        context_lens_host=[batch.context] * batch.sequences,
    )
    return meta, blocks


def check(case: Case) -> dict[str, Any]:
    """Whether its results are right, and how far off the worst is: for exact ones the elements that
    differ, else the largest difference beyond the relative tolerance, to the absolute one."""
    worst = 0.0
    for actual, expected in case.pairs():
        if case.exact:
            worst = max(worst, float((actual != expected).sum()))
            continue
        atol, rtol = TOLERANCE[actual.dtype]
        wide, oracle = actual.float(), expected.float()
        excess = ((wide - oracle).abs() - rtol * oracle.abs()).max().item() / atol
        worst = max(worst, excess if math.isfinite(excess) else math.inf)
    return {"right": worst <= (0 if case.exact else 1), "worst": worst, "exact": case.exact}
