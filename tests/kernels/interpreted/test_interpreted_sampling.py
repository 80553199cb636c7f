"""Triton's sampling against the reference: the same noise bit by bit, the same tokens."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.reference import sampling as reference
from kernels.triton.sampling import (
    BLOCK,
    gumbel_noise,
    gumbel_sample,
    log_of_normal,
    pack_parameters,
    sample_on_device,
)


@triton.jit
def noise_kernel(out_ptr, seed, choice, index, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    noise = gumbel_noise(block, seed, choice, index, BLOCK)
    tl.store(out_ptr + block * BLOCK + tl.arange(0, BLOCK), noise)


@triton.jit
def log_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, log_of_normal(tl.load(x_ptr + at)))


@pytest.mark.parametrize(
    ("seed", "choice", "index"),
    [(0, 0, 0), (5, 1, 2), ((1 << 63) - 25, 3, 70_000), (-(1 << 63), 0, 9), (-1, 2**31 - 1, 1)],
)
def test_the_noise_is_the_references_bit_by_bit(seed: int, choice: int, index: int) -> None:
    vocab = 16 * 1024
    out = torch.empty(vocab)
    noise_kernel[(vocab // 1024,)](out, seed, choice, index, BLOCK=1024)
    assert torch.equal(out, reference.gumbel_noise(vocab, seed, choice, index))


def test_the_logarithm() -> None:
    x = torch.cat(
        (
            torch.logspace(-290, 290, 4096, base=10, dtype=torch.float64),
            1 + torch.linspace(-1e-3, 1e-3, 4096, dtype=torch.float64),
            torch.tensor([0.5, 1.0, 2.0, 2**-0.5, 2**0.5, 1 - 2**-33, 16.6, 2.0**-33]).double(),
            torch.linspace(0.1, 17, 4088, dtype=torch.float64),
        )
    )
    out = torch.empty_like(x)
    log_kernel[(len(x) // 1024,)](x, out, BLOCK=1024)
    torch.testing.assert_close(out, x.log(), rtol=5e-16, atol=0)
    assert out[8193] == 0  # the logarithm of 1


@pytest.mark.parametrize("vocab", [1, 3, 67, BLOCK, 2 * BLOCK + 1, 49152])
def test_the_tokens_are_the_references(vocab: int, rng: torch.Generator) -> None:
    rows = 12 if vocab < 49152 else 2
    logits = 3 * torch.randn(rows, vocab, generator=rng)
    settings_of_rows = (
        [0.0 if i % 5 == 1 else 0.3 + 0.1 * i for i in range(rows)],
        [(1.0, 0.9, 0.5, 1e-9)[i % 4] for i in range(rows)],
        [(1 << 63) * (i % 2) + 7919 * i - 5 for i in range(rows)],
        [i % 4 for i in range(rows)],
        [1000 * i for i in range(rows)],
    )
    assert gumbel_sample(logits, *settings_of_rows) == reference.gumbel_sample(
        logits, *settings_of_rows
    )


def test_flat_logits_need_several_tries_and_end_in_the_nucleus() -> None:
    logits = torch.zeros(6, 3000)  # equal z: ids rank, so the nucleus is the first tokens
    arguments = ([1.0] * 6, [0.004] * 6, [3] * 6, [0] * 6, list(range(6)))
    tokens = gumbel_sample(logits, *arguments)
    assert tokens == reference.gumbel_sample(logits, *arguments)
    assert max(tokens) < 12


@settings(max_examples=30)
@given(
    levels=st.lists(
        st.sampled_from([-float("inf"), -4.0, -1.0, 0.0, 0.5, 0.5, 2.0]), min_size=1, max_size=9
    ),
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0]),
    top_p=st.floats(0.01, 1.0),
    seed=st.integers(-(1 << 63), (1 << 64) - 1),
)
def test_ties_masks_and_borders(
    levels: list[float], temperature: float, top_p: float, seed: int
) -> None:
    logits = torch.tensor([levels, [*levels[1:], 1.0]])
    arguments = ([temperature] * 2, [top_p] * 2, [seed] * 2, [0, 1], [7, 8])
    assert gumbel_sample(logits, *arguments) == reference.gumbel_sample(logits, *arguments)


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_rows_without_a_finite_maximum_are_told_apart(value: float) -> None:
    logits = torch.zeros(3, 1100)
    if value == float("-inf"):
        logits[1] = value
    else:
        logits[1, 1066] = value
    arguments = ([0.0, 1.0, 1.0], [1.0, 0.5, 0.5], [1] * 3, [0] * 3, [0] * 3)
    tokens = sample_on_device(logits, pack_parameters(*arguments)).tolist()
    assert tokens[1] == -1
    assert tokens[0] == 0
    assert 0 <= tokens[2] < 1100
    assert (
        gumbel_sample(logits, *arguments) == tokens == reference.gumbel_sample(logits, *arguments)
    )


def test_no_rows_are_no_tokens() -> None:
    assert gumbel_sample(torch.empty(0, 5), [], [], [], [], []) == []


def test_what_does_not_fit_is_refused() -> None:
    parameters = pack_parameters([1.0], [1.0], [0], [0], [0])
    for logits in (torch.zeros(2, 5), torch.zeros(1, 5).half()):
        with pytest.raises(ValueError, match="sample"):
            sample_on_device(logits, parameters)
