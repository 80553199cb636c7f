"""An accelerator's penalties in a step: each sampled row by its own sequence alone."""

from __future__ import annotations

import pytest
import torch

from kernels.reference.penalties import penalize
from pop_node.engine.messages import Add
from pop_node.engine.running.device_sampler import DeviceSampler
from pop_node.engine.scheduling.schedule import Row, Schedule
from pop_node.engine.scheduling.sequence import Sequence

VOCAB = 50


def a_row(seq: int, **penalties: float) -> Row:
    """A decode row of the prompt 3 5 and the answer 7 7 9."""
    add = Add(seq, "both", [3, 5], [7, 7, 9], 9, 0.0, 1.0, 0, [], b"", b"", **penalties)
    return Row(Sequence.from_add(add, seq, 0.0), 4, 1)


def test_rows_are_penalised_by_their_own_sequences(rng: torch.Generator) -> None:
    rows = [a_row(1), a_row(2, repetition_penalty=1.5), a_row(3, frequency_penalty=0.25)]
    rows.insert(1, Row(rows[0].sequence, 0, 1))  # of a prompt: nothing is drawn after it
    logits = torch.randn(3, VOCAB, generator=rng)
    expected = logits.clone()
    whole, said = torch.tensor([3, 5, 7, 9]), torch.tensor([7, 9])
    penalize(expected[1], whole.int(), torch.tensor([0, 0, 2, 1]).int(), 1.5, 0.0, 0.0)
    penalize(expected[2], said.int(), torch.tensor([2, 1]).int(), 1.0, 0.25, 0.0)
    DeviceSampler().penalize(logits, Schedule(tuple(rows), (0, 2, 3), (), 4))
    assert torch.equal(logits, expected)


def test_what_is_not_told_yet_cannot_be_penalised() -> None:
    row = a_row(1, repetition_penalty=1.5)
    ahead = Row(row.sequence, 5, 1)
    with pytest.raises(AssertionError, match="on its way"):
        DeviceSampler().penalize(torch.zeros(1, VOCAB), Schedule((ahead,), (0,), (), 1))
