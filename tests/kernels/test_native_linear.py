"""Native matrix products against the reference, on every ISA, thin and thick."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, ISAS, TOLERANCE, close, native

from kernels.reference.linear import linear, logits

# (N, K): one, odd sizes that leave every kind of tail, and those of a 135M model.
SHAPES = [(1, 1), (3, 5), (65, 63), (130, 111), (96, 32), (576, 1536)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "depth"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 17, 33, 200])
def test_linear_and_logits(
    isa: str, dtype: torch.dtype, columns: int, depth: int, rows: int, rng: torch.Generator
) -> None:
    ops = native(isa)
    x = torch.randn(rows, depth, generator=rng).to(dtype)
    w = (torch.randn(columns, depth, generator=rng) / depth**0.5).to(dtype)
    bias = torch.randn(columns, generator=rng).to(dtype)
    close(ops.linear(x, w, None), linear(x, w, None))
    close(ops.linear(x, w, bias), linear(x, w, bias))
    # float32 out of bfloat16 inputs is exact up to the order of float32 sums.
    wide = ops.logits(x, w)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, logits(x, w), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_its_batch(isa: str, rng: torch.Generator) -> None:
    x = torch.randn(150, 576, generator=rng).bfloat16()
    w = torch.randn(66, 576, generator=rng).bfloat16()
    whole = native(isa).logits(x, w)
    for rows in (1, 2, 65, 71):
        assert torch.equal(native(isa).logits(x[:rows], w), whole[:rows])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(threads: int, rng: torch.Generator) -> None:
    x = torch.randn(300, 576, generator=rng).bfloat16()
    w = torch.randn(960, 576, generator=rng).bfloat16()
    ops, alone = native("portable", threads), native("portable", 1)
    assert torch.equal(ops.linear(x[:5], w, None), alone.linear(x[:5], w, None))
    assert torch.equal(ops.linear(x, w, None), alone.linear(x, w, None))


def test_no_rows() -> None:
    ops = native("portable")
    assert ops.linear(torch.zeros(0, 8), torch.zeros(4, 8), None).shape == (0, 4)
    assert ops.logits(torch.zeros(0, 8), torch.zeros(4, 8)).shape == (0, 4)


def test_shapes_and_dtypes_are_checked() -> None:
    ops = native("portable")
    with pytest.raises(ValueError, match="do not fit"):
        ops.linear(torch.zeros(1, 8), torch.zeros(4, 9), None)
    with pytest.raises(ValueError, match="do not fit"):
        ops.linear(torch.zeros(1, 8), torch.zeros(4, 8), torch.zeros(5))
    with pytest.raises(ValueError, match="dtypes"):
        ops.linear(torch.zeros(1, 8), torch.zeros(4, 8).bfloat16(), None)
    with pytest.raises(ValueError, match="dtypes"):
        ops.linear(torch.zeros(1, 8).half(), torch.zeros(4, 8).half(), None)
