"""From logits to tokens: hands each row's own sampling facts to the operation that draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kernels.ops import Ops
from pop_node.engine.scheduling.schedule import Row
from pop_node.engine.scheduling.sequence import Sequence
from pop_node.engine.scheduling.tally import Tally


def sample(ops: Ops, logits: torch.Tensor, rows: list[Row]) -> list[int]:
    """One token id per row of ``logits`` [S, vocab] float32; each of ``rows`` owns one of them and
    one more for each of its drafts.

    The noise is keyed by (seed, choice, output index, token id) and by nothing else, so it is the
    same on any node, after any preemption and whether a token was guessed or not. Every sequence
    here is choice 0 of its request.
    """
    sequences: list[Sequence] = []
    indices: list[int] = []
    for row in rows:
        index = row.sequence.output_tokens
        for ahead in range(1 + len(row.drafts)):
            sequences.append(row.sequence)
            indices.append(index + ahead)
    for line, sequence in enumerate(sequences):
        if sequence.tally is not None:
            penalize_row(ops.penalize, logits[line], sequence, sequence.tally)
    return ops.gumbel_sample(
        logits,
        [s.temperature for s in sequences],
        [s.top_p for s in sequences],
        [s.seed for s in sequences],
        [0] * len(sequences),
        indices,
        [s.top_k for s in sequences] if any(s.top_k for s in sequences) else None,
        [s.min_p for s in sequences] if any(s.min_p for s in sequences) else None,
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
