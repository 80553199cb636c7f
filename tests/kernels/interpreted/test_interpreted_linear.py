"""Triton's invariant matrix product against the reference, and its rows in many surroundings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted_cases import DOT_DTYPES, close, matmul_in_one_order

from kernels.reference import linear as reference
from kernels.triton.linear import (
    FEW_COLUMNS,
    invariant_linear,
    invariant_logits,
    linear,
    logits,
    plan_matmul,
)

SHAPES = [(1, 1, 1), (3, 65, 63), (70, 33, 130), (65, 200, 96), (0, 5, 5)]


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_linear_and_logits(
    rows: int, columns: int, depth: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    x = torch.randn(rows, depth, generator=rng).to(dtype)
    weight = (torch.randn(columns, depth, generator=rng) / depth**0.5).to(dtype)
    bias = torch.randn(columns, generator=rng).to(dtype)
    for of in (linear, invariant_linear):
        close(of(x, weight, None), reference.linear(x, weight, None))
        close(of(x, weight, bias), reference.linear(x, weight, bias))
    for of in (logits, invariant_logits):
        close(of(x, weight), reference.logits(x, weight))


def test_weights_with_many_outputs_have_wide_tiles(rng: torch.Generator) -> None:
    x = torch.randn(2, 33, generator=rng).half()
    weight = torch.randn(FEW_COLUMNS + 9, 33, generator=rng).half() / 6
    close(invariant_logits(x, weight), reference.logits(x, weight))


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_a_row_has_its_bits_in_any_batch(
    dtype: torch.dtype, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "matmul", matmul_in_one_order)
    x = torch.randn(150, 40, generator=rng).to(dtype)
    weight = torch.randn(37, 40, generator=rng).to(dtype)
    whole = invariant_logits(x, weight)
    for span in (slice(0, 1), slice(31, 34), slice(63, 130), slice(149, 150), slice(1, 150)):
        assert torch.equal(invariant_logits(x[span], weight), whole[span])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [576, 4096, 128256])
def test_the_plan_does_not_see_the_rows(columns: int, dtype: torch.dtype) -> None:
    weight = torch.empty(columns, 64, dtype=dtype, device="meta")
    plans = []
    for rows in (1, 7, 64, 4096):
        x = torch.empty(rows, 64, dtype=dtype, device="meta")
        out = torch.empty(rows, columns, dtype=dtype, device="meta")
        plan = plan_matmul(x, weight, None, out)
        plans.append((plan.constants, plan.warps, plan.stages))
    assert all(plan == plans[0] for plan in plans)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    for bad, bias in ((weight[:, :7], None), (weight.half(), None), (weight, torch.ones(2))):
        with pytest.raises(ValueError, match="matmul"):
            invariant_linear(x, bad, bias)
