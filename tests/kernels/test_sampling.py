"""Sampling: Philox known answers, the distribution drawn from, the nucleus, native = reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ISAS, native

from kernels.reference.sampling import gumbel_noise, gumbel_sample, nucleus, philox_4x32

# Counter, key and result of Random123's published known-answer vectors for philox4x32, 10 rounds.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# Upper 0.1 % point of chi-square with 15 degrees of freedom (standard tables).
CHI_SQUARE_15 = 37.70


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert tuple(philox_4x32(torch.tensor(counter), key).tolist()) == words


def draw(
    logits: torch.Tensor, *, temperature: float = 1.0, top_p: float = 1.0, isa: str | None = None
) -> torch.Tensor:
    """One token per row, each row with an output index of its own."""
    rows = logits.shape[0]
    sample = gumbel_sample if isa is None else native(isa).gumbel_sample
    return torch.tensor(
        sample(logits, [temperature] * rows, [top_p] * rows, [77] * rows, [3] * rows, range(rows))
    )


@pytest.mark.parametrize("isa", [None, *ISAS])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_follow_the_softmax(isa: str | None, temperature: float) -> None:
    rows = 6000
    logits = torch.linspace(0, 2.5, 16).roll(5)
    drawn = draw(logits.expand(rows, 16), temperature=temperature, isa=isa)
    expected = rows * torch.softmax(logits / temperature, dim=0)
    chi_square = ((drawn.bincount(minlength=16) - expected) ** 2 / expected).sum()
    assert chi_square < CHI_SQUARE_15


@pytest.mark.parametrize("isa", [None, *ISAS])
def test_top_p_keeps_the_nucleus_and_its_proportions(isa: str | None) -> None:
    rows = 4000
    # 16 tokens hold 0.05 each and rank first, 100 share the rest: 0.74 is reached within the 16.
    probabilities = torch.cat((torch.full((100,), 0.002), torch.full((16,), 0.05)))
    drawn = draw(probabilities.log().expand(rows, 116), top_p=0.7999, isa=isa)
    counts = drawn.bincount(minlength=116)
    assert counts[:100].sum() == 0
    assert (((counts[100:] - rows / 16) ** 2) / (rows / 16)).sum() < CHI_SQUARE_15


@pytest.mark.parametrize("isa", [None, *ISAS])
def test_a_tiny_top_p_is_greedy(isa: str | None, rng: torch.Generator) -> None:
    logits = torch.randn(20, 300, generator=rng)
    assert draw(logits, top_p=1e-9, isa=isa).equal(logits.argmax(dim=1))


@pytest.mark.parametrize("isa", [None, *ISAS])
@pytest.mark.parametrize("vocab", [1, 7, 64, 301])
def test_greedy_takes_the_lowest_id_of_a_tie(isa: str | None, vocab: int) -> None:
    logits = torch.full((3, vocab), -1.0)
    logits[1, vocab // 2 :] = 2.5
    logits[2, vocab - 1] = -0.5
    expected = [0, vocab // 2, vocab - 1]
    assert draw(logits, temperature=0.0, isa=isa).tolist() == expected


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 3, 67, 1000, 49152])
def test_native_draws_the_reference_tokens(isa: str, vocab: int, rng: torch.Generator) -> None:
    rows = 24 if vocab < 49152 else 6
    logits = 3 * torch.randn(rows, vocab, generator=rng)
    settings_of_rows = (
        [0.0 if i % 5 == 0 else 0.3 + 0.1 * i for i in range(rows)],
        [(1.0, 0.9, 0.5)[i % 3] for i in range(rows)],
        [(1 << 63) * (i % 2) + 7919 * i - 5 for i in range(rows)],
        [i % 4 for i in range(rows)],
        [1000 * i for i in range(rows)],
    )
    assert native(isa).gumbel_sample(logits, *settings_of_rows) == gumbel_sample(
        logits, *settings_of_rows
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spread", [0.0, 0.1, 4.0, 40.0])
def test_no_token_that_would_win_is_passed_over(
    isa: str, spread: float, rng: torch.Generator
) -> None:
    # Without limits most noise is never computed: whether the noise or the logits decide.
    rows, vocab = 48, 777
    logits = spread * torch.randn(rows, vocab, generator=rng)
    logits[::3, 100:600] = float("-inf")
    drawn = (
        [(0.2, 1.0, 3.0)[i % 3] for i in range(rows)],
        [1.0] * rows,
        *([11 * i for i in range(rows)], [0] * rows, [5] * rows),
    )
    assert native(isa).gumbel_sample(logits, *drawn) == gumbel_sample(logits, *drawn)


@pytest.mark.parametrize("isa", [None, *ISAS])
@pytest.mark.parametrize("temperature", [1e-300, 1e-46])
def test_a_temperature_that_is_0_in_float32_is_greedy(isa: str | None, temperature: float) -> None:
    logits = torch.tensor([[0.5, -1.0, 3.0, 3.0, 2.9]])
    sample = gumbel_sample if isa is None else native(isa).gumbel_sample
    for top_p in (1.0, 0.5):
        assert sample(logits, [temperature], [top_p], [1], [0], [0]) == [2]


@pytest.mark.parametrize("isa", ISAS)
def test_settings_that_come_again_and_such_that_changed(isa: str) -> None:
    """The same tuples are known again; lists, and tuples of other values, are read anew."""
    generator = torch.Generator().manual_seed(4)
    sample = native(isa).gumbel_sample
    kept = (0.7, 0.0, 1.3), (0.9, 1.0, 0.5), (1, 2, 1 << 63), (0, 0, 0)
    ends = (3, 0, 9), (0.0, 0.3, 0.0)
    seeds = [1, 2, 3]
    for index in range(6):
        logits = torch.randn(3, 300, generator=generator)
        seeds[1] += 1
        for first in (kept, (*kept[:2], seeds, kept[3]), ((0.0, 2.0, 1.0), *kept[1:])):
            for last in (ends, (None, None), (ends[0], (0.9, 0.0, 0.1))):
                arguments = (*first, [index] * 3, *last)
                assert sample(logits, *arguments) == gumbel_sample(logits, *arguments)


@pytest.mark.parametrize("isa", [None, *ISAS])
def test_masked_tokens_are_never_drawn(isa: str | None) -> None:
    logits = torch.zeros(200, 50)
    logits[:, ::2] = float("-inf")
    assert (draw(logits, isa=isa) % 2 == 1).all()
    assert (draw(logits, top_p=0.5, isa=isa) % 2 == 1).all()


@pytest.mark.parametrize("isa", [None, *ISAS])
@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_rows_without_a_finite_maximum_have_no_token(isa: str | None, value: float) -> None:
    logits = torch.zeros(3, 50)
    logits[1] = value
    for top_p in (1.0, 0.5):
        alone, *_ = draw(logits[:1], top_p=top_p, isa=isa).tolist()
        first, second, third = draw(logits, top_p=top_p, isa=isa).tolist()
        assert (first, second) == (alone, -1)
        assert third >= 0


@pytest.mark.parametrize("isa", [None, *ISAS])
def test_a_row_with_a_nan_has_no_token(isa: str | None) -> None:
    logits = torch.zeros(2, 70)
    logits[1, 66] = float("nan")
    first, second = draw(logits, isa=isa).tolist()
    assert first >= 0
    assert second == -1


def test_the_noise_depends_on_nothing_but_its_four_arguments() -> None:
    noise = gumbel_noise(1000, 5, 1, 2)
    assert torch.equal(gumbel_noise(77, 5, 1, 2), noise[:77])
    for other in ((6, 1, 2), (5, 2, 2), (5, 1, 3), (5 + (1 << 32), 1, 2)):
        assert not torch.equal(gumbel_noise(1000, *other), noise)
    assert torch.equal(gumbel_noise(1000, 5 - (1 << 64), 1, 2), noise)


def test_the_noise_is_gumbel() -> None:
    noise = gumbel_noise(200_000, 11, 0, 0).double()
    # Mean is Euler's constant, variance pi^2 / 6; bounds are five standard errors.
    assert abs(noise.mean() - 0.577216) < 5 * 1.2825 / 200_000**0.5
    assert abs(noise.var() - 1.644934) < 0.035
    assert torch.isfinite(noise).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-6, 3), min_size=1, max_size=12),
    st.floats(0.01, 0.999),
)
def test_the_nucleus_is_the_smallest_prefix_that_reaches_top_p(
    levels: list[int], top_p: float
) -> None:
    z = torch.tensor(levels, dtype=torch.float32)
    inside = nucleus(z, top_p)
    p = torch.softmax(z.double(), dim=0)
    assert inside.any()
    assert p[inside].sum() >= top_p - 1e-9
    if inside.sum() > 1:
        # Leaving out its last member, the one that ranks behind the others, falls short.
        last = min(inside.nonzero().flatten().tolist(), key=lambda i: (levels[i], -i))
        assert p[inside].sum() - p[last] < top_p
    assert p[~inside].max() <= p[inside].min() if (~inside).any() else True
