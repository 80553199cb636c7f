"""A scheduler and a runner without their process, which remember logits and KV."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from pop_node.engine.running.runner import Runner
from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.schedule import Schedule
from pop_node.engine.scheduling.scheduler import Scheduler
from pop_node.engine.scheduling.speculation import Speculation
from pop_node.engine.scheduling.validate import Limits
from pop_node.models.llama import Llama
from tests.pop_node.engine.engine_builders import an_add

BLOCK_TOKENS = 16
MAX_STEPS = 5000
"""Far above what any test here needs: a schedule that never ends is a failure."""


@dataclass
class Answer:
    """What became of one sequence.

    ``logits[i]`` are those that output token i was sampled from, ``kv`` the keys and values of all
    tokens when it last computed: [components x layers, tokens, heads, width].
    """

    ids: dict[int, int] = field(default_factory=dict)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    kv: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    recomputed: bool = False
    """Tokens were computed again: it was preempted."""


class RecordingEngine:
    """Runs sequences to their ends, one step at a time."""

    def __init__(
        self,
        model: Llama,
        *,
        budget: int = 512,
        num_blocks: int = 64,
        max_sequences: int = 8,
        speculation: Speculation | None = None,
    ) -> None:
        vocabulary = model.config.vocab_size
        self._pool = BlockPool(num_blocks, BLOCK_TOKENS)
        self._scheduler = Scheduler(
            self._pool,
            Limits(vocabulary, num_blocks * BLOCK_TOKENS, BLOCK_TOKENS, num_blocks),
            token_budget=budget,
            max_sequences=min(max_sequences, budget),
            max_waiting=64,
            speculation=speculation,
        )
        self._forward = model.forward
        self._logits = torch.empty(0)
        ops = model._ops
        self._runner = Runner(_Listening(model, self._heard), ops, num_blocks, BLOCK_TOKENS)
        for component in self._runner.cache:
            component.fill_(float("nan"))
        self.answers: dict[int, Answer] = {}
        self.cached_tokens: dict[int, int] = {}
        self.num_steps = 0

    def _heard(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def add(self, prompt: list[int], forced: list[int] | None = None, **changes: Any) -> int:
        """Queue a sequence; its number."""
        seq = len(self.answers) + 1
        self.answers[seq] = Answer()
        add = an_add(seq, prompt_ids=prompt, forced_ids=forced or [], **changes)
        assert self._scheduler.handle(add, 0.0) == []
        return seq

    def step(self) -> None:
        """Compute once, if there is something to compute."""
        schedule, _ = self._scheduler.schedule(0.0)
        if not schedule.rows:
            return
        for row in schedule.rows:
            self.cached_tokens.setdefault(row.sequence.seq, row.start)
        ids = self._runner.run(schedule, lambda layer: None)
        self._remember(schedule, ids)
        self.num_steps += 1
        self._scheduler.complete(schedule, ids, 0.0)
        self._scheduler.check()

    def _remember(self, schedule: Schedule, ids: list[int]) -> None:
        for row in schedule.rows:
            sequence = row.sequence
            answer = self.answers[sequence.seq]
            answer.recomputed |= row.start < answer.kv.shape[1]
            known = row.end - len(row.drafts)
            blocks = torch.tensor(sequence.blocks, dtype=torch.int64)
            answer.kv = torch.cat(
                [c[:, blocks].flatten(1, 2)[:, :known] for c in self._runner.cache]
            )
        drawn = zip(ids, self._logits, strict=True)
        for index in schedule.sampled:
            row = schedule.rows[index]
            answer, at = self.answers[row.sequence.seq], row.sequence.output_tokens
            right = True  # every token before was
            for draft in (*row.drafts, None):
                token, logits = next(drawn)
                if right:
                    answer.ids[at], answer.logits[at] = token, logits.clone()
                at, right = at + 1, right and token == draft

    def run(self) -> None:
        """Step until every sequence has ended."""
        for _ in range(MAX_STEPS):
            if self._scheduler.num_sequences == 0:
                return
            self.step()
        raise AssertionError("the schedule does not end")


class _Listening:
    """A model whose logits are also told to ``heard``."""

    def __init__(self, model: Llama, heard: Any) -> None:
        self._model = model
        self._heard = heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, *arguments: Any) -> torch.Tensor:
        logits = self._model.forward(*arguments)
        self._heard(logits)
        return logits


def assert_same(actual: Answer, expected: Answer) -> None:
    """Every logit and every byte of KV that both know is equal, and every token."""
    assert actual.ids.keys() <= expected.ids.keys()
    for index, token in actual.ids.items():
        assert torch.equal(actual.logits[index], expected.logits[index]), f"logits of {index}"
        assert token == expected.ids[index]
    tokens = min(actual.kv.shape[1], expected.kv.shape[1])
    assert torch.equal(actual.kv[:, :tokens], expected.kv[:, :tokens])
