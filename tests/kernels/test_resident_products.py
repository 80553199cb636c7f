"""Products with resident weights have the bits of those with the same weights in 16 bits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from kernel_cases import ISAS, native
from test_decoder import MIXED, SHAPES, VOCAB, draw_step, draw_weights, one_by_one, same
from test_resident_form import draw, of_patterns

from kernels.decoder import DecoderWeights
from kernels.native.decoder import NativeDecoder
from kernels.native.resident import pack
from kernels.reference.decoder import decoder
from kernels.resident import ResidentMatrix, Weight

THREADS = (1, 2, 3)
ROWS = (1, 2, 3, 5, 6, 7, 12, 13, 16, 31, 40, 200)
"""Below, at and above a tile of every instruction set; one block of x, and several."""


def resident(weight: Weight) -> ResidentMatrix:
    """``weight`` in the form, which it must fit."""
    assert isinstance(weight, torch.Tensor)
    packed = pack(native("portable").context, weight)
    assert isinstance(packed, ResidentMatrix)
    return packed


@pytest.mark.parametrize("isa", ISAS)
# (N, K): of a 135M model, K of several blocks, rests of tiles, groups and vectors.
@pytest.mark.parametrize(
    "shape",
    [(100, 576), (30, 1536), (37, 577), (49, 63), (11, 126), (50, 2100), (12, 7001)],
)
def test_linear_and_logits(isa: str, shape: tuple[int, int], rng: torch.Generator) -> None:
    weight = draw(rng, *shape)
    bias = torch.randn(shape[0], generator=rng).bfloat16()
    packed = resident(weight)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], generator=rng).bfloat16()
        for threads in THREADS[: 1 + rows % 3]:
            ops = native(isa, threads)
            assert torch.equal(ops.linear(x, packed, None), ops.linear(x, weight, None))
            assert torch.equal(ops.linear(x, packed, bias), ops.linear(x, weight, bias))
            assert torch.equal(ops.logits(x, packed), ops.logits(x, weight))


@pytest.mark.parametrize("isa", ISAS)
def test_signs_of_zero_subnormals_and_what_is_not_finite(isa: str, rng: torch.Generator) -> None:
    """Also where K ends within a group: what lies beyond multiplies nothing."""
    ops = native(isa)
    for columns in (128, 150):
        weight = draw(rng, 64, columns)
        weight[:8] = of_patterns(torch.randint(0, 256, (8, columns), generator=rng) | 0x8000)
        weight[8:12] = -0.0
        weight[12:16, -1] = float("inf")
        weight[16:20, 3] = float("nan")
        packed = resident(weight)
        for rows in (1, 4, 9, 60):
            x = torch.randn(rows, columns, generator=rng).bfloat16()
            x[0] = -0.0
            ours, theirs = ops.logits(x, packed), ops.logits(x, weight)
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
            assert ours[:, 16:20].isnan().all()


def test_no_rows_and_shapes_that_do_not_fit(rng: torch.Generator) -> None:
    ops = native("portable")
    packed = resident(draw(rng, 8, 64))
    assert ops.linear(torch.zeros(0, 64).bfloat16(), packed, None).shape == (0, 8)
    with pytest.raises(ValueError, match="do not fit"):
        ops.linear(torch.zeros(1, 63).bfloat16(), packed, None)
    with pytest.raises(ValueError, match="dtypes"):
        ops.linear(torch.zeros(1, 64), packed, None)
    torn = replace(packed, starts=packed.starts[:-1])
    with pytest.raises(ValueError, match="do not fit"):
        ops.linear(torch.zeros(1, 64).bfloat16(), torn, None)


def packed_weights(weights: DecoderWeights) -> DecoderWeights:
    """All matrices in the form, the embedding and the head as one."""
    embedding = resident(weights.embedding)
    layers = tuple(
        replace(
            layer,
            qkv=resident(layer.qkv),
            output=resident(layer.output),
            gate_up=resident(layer.gate_up),
            down=resident(layer.down),
        )
        for layer in weights.layers
    )
    return replace(weights, embedding=embedding, head=embedding, layers=layers)


@pytest.mark.parametrize("isa", ISAS)
def test_a_decoder(isa: str, rng: torch.Generator) -> None:
    shape = SHAPES[0]
    weights = draw_weights(rng, shape, torch.bfloat16)
    assert isinstance(weights.embedding, torch.Tensor)
    weights.embedding[torch.rand(VOCAB, shape.hidden, generator=rng) < 0.005] *= 1e-25
    packed = packed_weights(weights)
    for lens in ([(1, 5)], [(1, 20), (1, 33), (1, 1)], [(1, 9)] * 16, MIXED):
        step = draw_step(rng, shape, torch.bfloat16, lens)
        expected = step.run(partial(decoder, one_by_one(isa), weights))
        assert same(step.run(partial(decoder, one_by_one(isa), packed)), expected)
        for threads in THREADS:
            assert same(step.run(NativeDecoder(native(isa, threads).context, packed)), expected)
