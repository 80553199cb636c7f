"""From logits to tokens: hands each row's own sampling facts to the operation that draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kernels.ops import Ops
from pop_node.engine.scheduling.schedule import Row
from pop_node.engine.scheduling.sequence import Sequence
from pop_node.engine.scheduling.tally import Tally


@dataclass(frozen=True, slots=True)
class _Facts:
    """What stays as it is while the same sequences decode. Tuples: an operation that has seen one
    may know it again."""

    sequences: list[Sequence]
    temperature: tuple[float, ...]
    top_p: tuple[float, ...]
    seed: tuple[int, ...]
    choice: tuple[int, ...]
    top_k: tuple[int, ...] | None
    min_p: tuple[float, ...] | None
    tallies: list[tuple[int, Sequence, Tally]]  # with the line of the logits

    @classmethod
    def of(cls, sequences: list[Sequence]) -> _Facts:
        return cls(
            sequences,
            tuple(s.temperature for s in sequences),
            tuple(s.top_p for s in sequences),
            tuple(s.seed for s in sequences),
            (0,) * len(sequences),
            tuple(s.top_k for s in sequences) if any(s.top_k for s in sequences) else None,
            tuple(s.min_p for s in sequences) if any(s.min_p for s in sequences) else None,
            [(line, s, s.tally) for line, s in enumerate(sequences) if s.tally is not None],
        )


class RowSampler:
    """Draws the tokens of one engine on the host."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._facts = _Facts.of([])

    def draw(self, logits: torch.Tensor, rows: list[Row]) -> list[int]:
        """One token id per row of ``logits`` [S, vocab] float32; each of ``rows`` owns one of them
        and one more for each of its drafts.

        The noise is keyed by (seed, choice, output index, token id) and by nothing else, so it is
        the same on any node, after any preemption and whether a token was guessed or not. Every
        sequence here is choice 0 of its request.
        """
        sequences: list[Sequence] = []
        indices: list[int] = []
        for sequence, _, _, drafts in rows:
            index = len(sequence.ids) - sequence.prompt_tokens
            sequences.append(sequence)
            indices.append(index)
            for ahead in range(1, 1 + len(drafts)):
                sequences.append(sequence)
                indices.append(index + ahead)
        facts = self._facts
        if sequences != facts.sequences:
            facts = self._facts = _Facts.of(sequences)
        for line, sequence, tally in facts.tallies:
            penalize_row(self._ops.penalize, logits[line], sequence, tally)
        return self._ops.gumbel_sample(
            *(logits, facts.temperature, facts.top_p, facts.seed, facts.choice, indices),
            *(facts.top_k, facts.min_p),
        )


def penalize_row(
    penalize: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, float, float], None],
    line: torch.Tensor,
    sequence: Sequence,
    tally: Tally,
) -> None:
    """Change a row of logits [vocab] by what its sequence holds already; ``penalize`` as in
    ``kernels.reference.penalties``, given ids and counts on the host."""
    tally.catch_up(sequence.ids, sequence.prompt_tokens)
    ids, counts = (
        torch.from_numpy(np.array(of, dtype=np.int32)) for of in (tally.ids, tally.counts)
    )
    penalize(line, ids, counts, *tally.penalties)
