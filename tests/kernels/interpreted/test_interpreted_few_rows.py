"""Products of few rows, with and without gates, against the reference; who is sent there."""

from __future__ import annotations

import pytest
import torch
from interpreted_cases import DOT_DTYPES, close

from kernels.reference.activation import silu_mul
from kernels.reference.linear import linear, logits
from kernels.triton import few_rows
from kernels.triton.few_rows import FEW_ROWS, MAX_LINES, PROGRAMS, plan_few_rows
from kernels.triton.ops import TritonOps

SHAPES = [(2, 64), (6, 1), (50, 100), (66, 192), (6, 1024), (10, 2049), (4, 3072)]
"""Outputs and depth: whole and partial tiles of either, a pass and several, whole loads or not."""


def operands(
    rows: int, columns: int, depth: int, dtype: torch.dtype, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, depth, generator=rng).to(dtype)
    return x, (torch.randn(columns, depth, generator=rng) / depth**0.5).to(dtype)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
@pytest.mark.parametrize("rows", range(1, FEW_ROWS + 1))
def test_products_and_gates(
    rows: int, columns: int, depth: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    x, weight = operands(rows, columns, depth, dtype, rng)
    close(few_rows.product(x, weight, dtype), linear(x, weight, None))
    close(few_rows.product(x, weight, torch.float32), logits(x, weight))
    close(few_rows.gate_up(x, weight), silu_mul(linear(x, weight, None)))


def test_a_matrix_with_rows_enough_has_larger_tiles(rng: torch.Generator) -> None:
    x, weight = operands(1, 2 * PROGRAMS + 6, 1024, torch.float32, rng)
    plan = plan_few_rows(x, weight, torch.empty(1, len(weight)), gate=False)
    assert plan.constants["BLOCK_N"] > few_rows.PASS_ELEMENTS // plan.constants["BLOCK_K"]
    close(few_rows.product(x, weight, torch.float32), logits(x, weight))


def test_nothing_is_written_beside_the_result(rng: torch.Generator) -> None:
    x, weight = operands(3, 22, 40, torch.float32, rng)
    for gate, width in ((False, 22), (True, 11)):
        around = torch.full((5, width), float("nan"))
        plan_few_rows(x, weight, around[1:4], gate=gate).run()
        assert around.isnan().all(dim=1).tolist() == [True, False, False, False, True]
        assert not around[1:4].isnan().any()


def test_rows_of_a_wider_tensor(rng: torch.Generator) -> None:
    x, weight = operands(2, 10, 96, torch.float32, rng)
    wide = torch.full((2, 200), float("nan"))
    wide[:, 50:146] = x
    close(few_rows.product(wide[:, 50:146], weight, torch.float32), linear(x, weight, None))


@pytest.mark.parametrize(("columns", "depth"), [(4096, 14336), (28672, 4096), (3072, 576)])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_programs_are_many_of_few_rows_of_the_matrix(rows: int, columns: int, depth: int) -> None:
    x, weight, out = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((rows, depth), (columns, depth), (rows, columns))
    )
    plan = plan_few_rows(x, weight, out, gate=False)
    smallest = few_rows.PASS_ELEMENTS // plan.constants["BLOCK_K"]
    assert smallest <= plan.constants["BLOCK_N"] <= max(smallest, MAX_LINES)
    assert depth % plan.constants["BLOCK_K"] == 0
    assert plan.grid[0] >= PROGRAMS or plan.constants["BLOCK_N"] == smallest


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_batch_of_any_size_has_its_gates(
    rows: int, batch_invariant: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plan = few_rows.plan_few_rows

    def noted(x: torch.Tensor, *others: torch.Tensor, gate: bool) -> object:
        asked.append(len(x))
        return plan(x, *others, gate=gate)

    monkeypatch.setattr(few_rows, "plan_few_rows", noted)
    x, weight = operands(rows, 26, 64, torch.float32, rng)
    found = TritonOps(4, batch_invariant=batch_invariant).gate_up(x, weight)
    close(found, silu_mul(linear(x, weight, None)))
    # A row's bits would depend on how many there are.
    assert asked == ([] if batch_invariant or rows > FEW_ROWS else [rows])


def test_what_does_not_fit_is_refused() -> None:
    x, weight, out = torch.ones(2, 8), torch.ones(4, 8), torch.ones(2, 4)
    for bad in ((x[:, :7], weight, out), (x, weight.half(), out), (x, weight, out[:, :3])):
        with pytest.raises(ValueError, match="few_rows"):
            plan_few_rows(*bad, gate=False)
    many = torch.ones(FEW_ROWS + 1, 8)
    with pytest.raises(ValueError, match="few_rows"):
        plan_few_rows(many, weight, torch.ones(FEW_ROWS + 1, 4), gate=False)
    with pytest.raises(ValueError, match="few_rows"):
        plan_few_rows(x, weight[:3], torch.ones(2, 1), gate=True)
