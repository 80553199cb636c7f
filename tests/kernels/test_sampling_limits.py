"""Top-k, min-p and penalties: what they mean, and that the native versions mean the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ISAS, native
from transformers.generation import logits_process as warpers

from kernels.reference.penalties import penalize
from kernels.reference.sampling import allowed, gumbel_sample

SAMPLERS = [None, *ISAS]


def draw(logits: torch.Tensor, isa: str | None, top_k: int = 0, **limits: float) -> list[int]:
    """One token per row at temperature 0.8, each row with an output index of its own."""
    rows = logits.shape[0]
    sample = gumbel_sample if isa is None else native(isa).gumbel_sample
    one = ([0.8] * rows, [limits.get("top_p", 1.0)] * rows, [77] * rows, [3] * rows, range(rows))
    return sample(logits, *one, [top_k] * rows, [limits.get("min_p", 0.0)] * rows)


@pytest.mark.parametrize("isa", SAMPLERS)
def test_top_k_draws_from_the_k_largest(isa: str | None, rng: torch.Generator) -> None:
    logits = torch.randn(1, 200, generator=rng).expand(1500, 200)
    drawn = set(draw(logits, isa, top_k=5))
    assert drawn == set(logits[0].topk(5).indices.tolist())


@pytest.mark.parametrize("isa", SAMPLERS)
def test_top_k_of_one_is_greedy_and_of_many_is_no_limit(
    isa: str | None, rng: torch.Generator
) -> None:
    logits = torch.randn(40, 300, generator=rng)
    assert draw(logits, isa, top_k=1) == logits.argmax(dim=1).tolist()
    free = draw(logits, isa)
    assert draw(logits, isa, top_k=300) == draw(logits, isa, top_k=2**31) == free
    assert draw(logits, isa, min_p=1e-30) == free


@pytest.mark.parametrize("isa", SAMPLERS)
def test_tokens_that_equal_the_last_of_top_k_stay(isa: str | None) -> None:
    logits = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 0.0]).expand(400, 6)
    assert set(draw(logits, isa, top_k=3)) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("isa", SAMPLERS)
def test_min_p_is_relative_to_the_most_likely_token(isa: str | None) -> None:
    p = torch.tensor([0.5, 0.26, 0.24, 0.0])
    logits = (0.8 * p.log()).expand(400, 4)  # the temperature comes before
    assert set(draw(logits, isa, min_p=0.5)) == {0, 1}
    assert set(draw(logits, isa, min_p=0.4)) == {0, 1, 2}
    assert set(draw(logits, isa, min_p=1.0)) == {0}


@pytest.mark.parametrize("isa", SAMPLERS)
def test_top_p_is_of_what_top_k_left_and_min_p_comes_last(isa: str | None) -> None:
    p = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1])
    logits = (0.8 * p.log()).expand(600, 7)
    assert set(draw(logits, isa, top_p=0.55)) == {0, 1, 2}
    assert set(draw(logits, isa, top_k=2, top_p=0.55)) == {0}  # 0.6 of the mass of the two
    assert set(draw(logits, isa, top_p=0.55, min_p=0.5)) == {0, 1}


def test_the_limits_are_those_of_transformers(rng: torch.Generator) -> None:
    """An oracle that nobody here wrote, in its order: top-k, top-p, min-p."""
    for row in range(60):
        z = 2.5 * torch.randn(80, generator=rng)
        z -= z.max()
        top_k, top_p, min_p = (3, 12, 40)[row % 3], (0.5, 0.9, 0.99)[row % 4 % 3], 0.02 * (row % 5)
        scores = warpers.TopKLogitsWarper(top_k)(None, z[None])
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
        scores = warpers.MinPLogitsWarper(min_p)(None, scores)
        assert allowed(z, top_k, top_p, min_p).equal(scores[0] > -math.inf)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 3, 67, 1000, 49152])
def test_native_draws_the_reference_tokens(isa: str, vocab: int, rng: torch.Generator) -> None:
    rows = 24 if vocab < 49152 else 6
    logits = (3 * torch.randn(rows, vocab, generator=rng)).round(decimals=1)  # with ties
    arguments: Any = (
        [0.0 if i % 5 == 0 else 0.3 + 0.1 * i for i in range(rows)],
        [(1.0, 0.9, 0.5)[i % 3] for i in range(rows)],
        [7919 * i for i in range(rows)],
        [0] * rows,
        [1000 * i for i in range(rows)],
        [(0, 1, 2, 7, 50, vocab)[i % 6] for i in range(rows)],
        [(0.0, 0.3, 1e-3, 1.0)[i % 4] for i in range(rows)],
    )
    assert native(isa).gumbel_sample(logits, *arguments) == gumbel_sample(logits, *arguments)


def entries(counts: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.tensor(list(counts), dtype=torch.int32),
        torch.tensor(list(counts.values()), dtype=torch.int32),
    )


def test_penalties_by_hand() -> None:
    logits = torch.tensor([2.0, -2.0, 2.0, 5.0, -math.inf])
    penalize(logits, *entries({0: 0, 1: 3, 2: 1, 4: 1}), 2.0, 0.25, 0.5)
    assert logits.tolist() == [1.0, -4.0 - 1.25, 1.0 - 0.75, 5.0, -math.inf]


def test_repetition_is_that_of_transformers(rng: torch.Generator) -> None:
    logits = torch.randn(1, 50, generator=rng)
    seen = [3, 9, 9, 41]
    expected = warpers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits.clone())
    penalize(logits[0], *entries({3: 0, 9: 2, 41: 1}), 1.3, 0.0, 0.0)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40),
    seen=st.dictionaries(st.integers(0, 39), st.integers(0, 9000), max_size=40),
    repetition=st.floats(0.01, 10.0),
    frequency=st.floats(-2.0, 2.0),
    presence=st.floats(-2.0, 2.0),
)
def test_native_penalties_have_the_reference_bits(
    logits: list[float],
    seen: dict[int, int],
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    seen = {token: count for token, count in seen.items() if token < len(logits)}
    expected = torch.tensor(logits)
    penalize(expected, *entries(seen), repetition, frequency, presence)
    for isa in ISAS[:1]:
        mine = torch.tensor(logits)
        native(isa).penalize(mine, *entries(seen), repetition, frequency, presence)
        assert mine.equal(expected)


@pytest.mark.parametrize("token", [-1, 5])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match="penalize"):
        native(ISAS[0]).penalize(torch.zeros(5), *entries({token: 1}), 1.1, 0.0, 0.0)
