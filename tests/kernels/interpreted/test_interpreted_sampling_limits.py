"""Triton's top-k, min-p and penalties against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.reference import penalties as reference_penalties
from kernels.reference import sampling as reference
from kernels.triton.penalties import penalize
from kernels.triton.sampling import BLOCK, gumbel_sample


@pytest.mark.parametrize("vocab", [1, 3, 67, 2 * BLOCK + 1])
def test_the_tokens_are_the_references(vocab: int, rng: torch.Generator) -> None:
    rows = 12
    logits = (3 * torch.randn(rows, vocab, generator=rng)).round(decimals=1)  # with ties
    arguments = (
        [0.0 if i % 7 == 1 else 0.3 + 0.1 * i for i in range(rows)],
        [(1.0, 0.9, 0.5)[i % 3] for i in range(rows)],
        [7919 * i - 5 for i in range(rows)],
        [i % 4 for i in range(rows)],
        [1000 * i for i in range(rows)],
        [(0, 1, 2, 7, 50, vocab)[i % 6] for i in range(rows)],
        [(0.0, 0.3, 1e-3, 1.0)[i % 4] for i in range(rows)],
    )
    assert gumbel_sample(logits, *arguments) == reference.gumbel_sample(logits, *arguments)


@settings(max_examples=20)
@given(
    levels=st.lists(
        st.sampled_from([-float("inf"), -4.0, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=9
    ),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_ties_masks_and_borders(
    levels: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.tensor([[*levels, 1.0], [0.5, *levels]])
    arguments = ([0.7, 2.0], [top_p] * 2, [5] * 2, [0, 1], [7, 8], [top_k] * 2, [min_p] * 2)
    assert gumbel_sample(logits, *arguments) == reference.gumbel_sample(logits, *arguments)


@pytest.mark.parametrize("count", [0, 1, 40, 1500])
def test_penalties_have_the_references_bits(count: int, rng: torch.Generator) -> None:
    logits = 5 * torch.randn(2000, generator=rng)
    ids = torch.randperm(2000, generator=rng)[:count].int()
    counts = torch.randint(0, 9, (count,), generator=rng).int()
    expected = logits.clone()
    reference_penalties.penalize(expected, ids, counts, 1.3, 0.1, -0.7)
    penalize(logits, ids, counts, 1.3, 0.1, -0.7)
    assert logits.equal(expected)


def test_what_does_not_fit_is_refused() -> None:
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="penalize"):
        penalize(torch.zeros(5), ids, ids, 1.0, 0.0, 0.0)
