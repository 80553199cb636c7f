"""Resident weights on Triton: every bit comes back, products agree with the reference's."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from interpreted_cases import close, matmul_in_one_order
from test_decoder import Shape, draw_step, draw_weights
from test_resident_form import bits, draw, of_patterns

from kernels.decoder import DecoderLayer, DecoderWeights
from kernels.ops import reference_ops
from kernels.reference import linear as reference
from kernels.reference.decoder import decoder
from kernels.reference.resident import pack as pack_readably
from kernels.reference.resident import pack_rows, unpack
from kernels.resident import ResidentMatrix, Weight
from kernels.triton import resident_form, resident_ops, resident_pack
from kernels.triton.ops import TritonOps
from kernels.triton.resident_form import parts_of, plan_rows, plan_unpack
from kernels.triton.resident_products import FEW_ROWS, MANY_ROWS, plan_product

WINDOW = torch.arange(112, 128).to(torch.uint8)
PALETTE = torch.tensor([0, 20, *range(113, 127)]).to(torch.uint8)


FORMS = [
    ((8, 64), WINDOW),
    ((8, 64), PALETTE),
    ((37, 1100), WINDOW),
    ((50, 577), PALETTE),
    ((49, 63), WINDOW),
]
"""[N, K]: whole tiles and groups, several programs, and rests of each kind."""

PRODUCTS = [
    ((37, 200), WINDOW, False),
    ((8, 1100), PALETTE, False),
    ((9, 63), WINDOW, False),
    ((37, 200), PALETTE, True),
]


def packed(weight: torch.Tensor, palette: torch.Tensor) -> ResidentMatrix:
    """``weight`` in the form, however many escapes that makes."""
    tiles, escaped, escapes = pack_rows(weight, palette)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), escaped.cumsum(0))).int()
    return ResidentMatrix(tuple(weight.shape), palette, tiles, starts, escapes)


def allocate(nbytes: int) -> torch.Tensor:
    return torch.full((nbytes,), 0xA5, dtype=torch.uint8)


def resident(weight: torch.Tensor) -> ResidentMatrix:
    """As an engine packs it."""
    found = resident_pack.pack(weight, allocate)
    assert isinstance(found, ResidentMatrix)
    return found


def poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize(("shape", "palette"), FORMS)
def test_every_bit_comes_back(
    shape: tuple[int, int], palette: torch.Tensor, rng: torch.Generator
) -> None:
    weight = draw(rng, *shape)
    matrix = packed(weight, palette)
    assert parts_of(matrix)[1]["WINDOW"] == (palette is WINDOW)
    assert len(matrix.escapes) > 0 or weight.numel() < 1000
    whole = poisoned(*shape)
    plan_unpack(matrix, 0, whole).run()
    assert torch.equal(bits(whole), bits(weight))
    part = poisoned(shape[0] - 4, shape[1])[:3]
    plan_unpack(matrix, 4, part).run()
    assert torch.equal(bits(part), bits(weight[4:7]))
    ids = torch.tensor([shape[0] - 1, 0, 2, 2])
    rows = poisoned(4, shape[1])
    plan_rows(matrix, ids, rows).run()
    assert torch.equal(bits(rows), bits(weight[ids]))


@pytest.mark.parametrize("palette", [WINDOW, PALETTE], ids=["window", "palette"])
def test_all_patterns_of_16_bits_nearly_all_of_them_escapes(
    palette: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaNs of every payload, infinities, subnormals and both zeros."""
    monkeypatch.setattr(resident_form, "ESCAPES", 512)  # the interpreter pays by the turn
    weight = of_patterns(torch.arange(65536).view(64, 1024))
    matrix = packed(weight, palette)
    assert len(matrix.escapes) == 240 * 256
    found = poisoned(64, 1024)
    plan_unpack(matrix, 0, found).run()
    assert torch.equal(bits(found), bits(weight))
    plan_rows(matrix, torch.tensor([63, 0]), found[:2]).run()
    assert torch.equal(bits(found[:2]), bits(weight[[63, 0]]))


@pytest.mark.parametrize("pattern", [0x0000, 0x8000, 0x7F80, 0x7FC1, 0x0001, 0x3F80])
def test_constant_matrices(pattern: int) -> None:
    weight = of_patterns(torch.full((9, 70), pattern))
    found = poisoned(9, 70)
    plan_unpack(packed(weight, PALETTE), 0, found).run()
    assert torch.equal(bits(found), bits(weight))


def test_an_id_without_a_row_reads_nothing_outside(rng: torch.Generator) -> None:
    weight = draw(rng, 7, 128)
    rows = poisoned(2, 128)
    plan_rows(resident(weight), torch.tensor([-3, 7]), rows).run()
    assert torch.equal(bits(rows), bits(weight[[0, 6]]))


@pytest.mark.parametrize(("shape", "palette", "batch_invariant"), PRODUCTS)
def test_products(
    shape: tuple[int, int], palette: torch.Tensor, batch_invariant: bool, rng: torch.Generator
) -> None:
    """More escapes in a tile than are handled at once, far below the others and far above."""
    weight = draw(rng, *shape, 0.03)
    weight[torch.rand(*shape, generator=rng) < 0.01] *= 50
    matrix = packed(weight, palette)
    ops = TritonOps(4, batch_invariant=batch_invariant)
    bias = torch.randn(shape[0], generator=rng).bfloat16()
    for rows in (1, 3, FEW_ROWS + 1):
        x = (torch.randn(rows, shape[1], generator=rng) / 8).bfloat16()
        close(ops.logits(x, matrix), reference.logits(x, weight))
    x = x[:3]
    close(ops.linear(x, matrix, bias), reference.linear(x, weight, bias))
    close(ops.linear(x[:1], matrix, bias), reference.linear(x[:1], weight, bias))
    assert ops.linear(x[:0], matrix, None).shape == (0, shape[0])


def test_what_is_not_finite_shows_in_its_own_rows(rng: torch.Generator) -> None:
    weight = draw(rng, 12, 190)
    weight[4, 189], weight[5, 3], weight[6, 7], weight[7] = float("inf"), float("nan"), 0.0, -0.0
    matrix = resident(weight)
    for rows in (1, 5):
        x = torch.rand(rows, 190, generator=rng).bfloat16() + 1
        found = TritonOps(4).logits(x, matrix)
        assert bool((found[:, 4] == float("inf")).all())
        assert bool(found[:, 5].isnan().all())
        assert bool((found[:, 7].abs() < 1e-20).all())
        finite = [row for row in range(12) if row not in (4, 5)]
        close(found[:, finite], reference.logits(x, weight[finite]))


def test_many_rows_are_multiplied_from_scratch_memory(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(rng, 21, 120, 0.01)
    bias = torch.randn(21, generator=rng).bfloat16()
    x = (torch.randn(MANY_ROWS + 1, 120, generator=rng) / 8).bfloat16()
    for room in (1 << 20, 8 * 120 * 2):
        monkeypatch.setattr(resident_ops, "SCRATCH_BYTES", room)
        ops = TritonOps(4)
        matrix = ops.pack(weight, allocate)
        assert isinstance(matrix, ResidentMatrix)
        scratch = ops._resident._scratch
        assert scratch.nbytes <= room
        close(ops.linear(x, matrix, bias), reference.linear(x, weight, bias))
        close(ops.logits(x, matrix), reference.logits(x, weight))
        assert ops._resident._scratch is scratch


def test_a_row_has_its_bits_in_any_batch(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "matmul", matmul_in_one_order)
    matrix = resident(draw(rng, 11, 190))
    assert len(matrix.escapes) > 0
    x = torch.randn(MANY_ROWS + 6, 190, generator=rng).bfloat16()
    ops = TritonOps(4, batch_invariant=True)
    whole = ops.logits(x, matrix)
    for span in (slice(0, 1), slice(31, 34), slice(50, 70), slice(69, 70), slice(0, FEW_ROWS)):
        assert torch.equal(ops.logits(x[span], matrix), whole[span])


def test_only_the_width_of_an_invariant_plan_sees_the_rows(rng: torch.Generator) -> None:
    matrix = resident(draw(rng, 11, 128))
    plans = []
    for rows in (1, FEW_ROWS, FEW_ROWS + 1, 4096):
        x, out = torch.zeros(rows, 128).bfloat16(), torch.empty(rows, 11)
        plans.append(plan_product(x, matrix, None, out, batch_invariant=True))
    assert len({plan.kernel for plan in plans}) == 1
    for few, many in ((plans[0], plans[1]), (plans[2], plans[3])):
        assert (few.constants, few.warps, few.stages) == (many.constants, many.warps, many.stages)


def test_packing(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_pack, "SLICE_WEIGHTS", 8 * 250)
    weight = draw(rng, 45, 250, 0.0005)
    matrix = resident(weight)
    assert torch.equal(bits(unpack(matrix)), bits(weight))
    assert parts_of(matrix)[1]["WINDOW"]
    assert matrix.nbytes < weight.nbytes
    # Too many far exponents for a window, so the palette is what the reference takes too.
    weight[torch.rand(45, 250, generator=rng) < 0.02] *= 1e-25
    matrix, readable = resident(weight), pack_readably(weight)
    assert isinstance(readable, ResidentMatrix)
    assert not parts_of(matrix)[1]["WINDOW"]
    for part in ("palette", "tiles", "starts", "escapes"):
        assert torch.equal(getattr(matrix, part), getattr(readable, part)), part


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(0, 64).bfloat16(),
        torch.zeros(1, 1).bfloat16(),
        torch.zeros(64, 64),
        of_patterns((torch.arange(64 * 256) % 256 << 7).view(64, 256)),
    ],
    ids=["nothing", "one", "float32", "all-escapes"],
)
def test_what_does_not_shrink_stays_as_it_is(weight: torch.Tensor) -> None:
    assert resident_pack.pack(weight, allocate) is weight


def test_the_window_holds_the_most_weights() -> None:
    counts = torch.zeros(256, dtype=torch.int64)
    counts[100:120] = 1000
    counts[110:126] += 5
    assert resident_pack.choose_window(counts).tolist() == list(range(104, 120))
    counts[:] = 0
    counts[255] = 1
    assert resident_pack.choose_window(counts).tolist() == list(range(240, 256))


def test_what_does_not_fit_is_refused(rng: torch.Generator) -> None:
    matrix = resident(draw(rng, 8, 64))
    x, out = torch.zeros(1, 64).bfloat16(), torch.empty(1, 8)
    with pytest.raises(ValueError, match="resident product"):
        plan_product(x.float(), matrix, None, out)
    with pytest.raises(ValueError, match="resident product"):
        plan_product(x, matrix, None, out[:, :7])
    with pytest.raises(ValueError, match="resident matrix"):
        plan_product(x, replace(matrix, starts=matrix.starts[:-1]), None, out)
    with pytest.raises(ValueError, match="resident_unpack"):
        plan_unpack(matrix, 2, torch.empty(6, 64).bfloat16())
    with pytest.raises(ValueError, match="resident_unpack"):
        plan_unpack(matrix, 4, torch.empty(5, 64).bfloat16())
    with pytest.raises(ValueError, match="resident_rows"):
        plan_rows(matrix, torch.zeros(2, dtype=torch.int32), torch.empty(2, 64).bfloat16())


def widened(weights: DecoderWeights) -> DecoderWeights:
    """The same numbers in float32."""

    def wide(part: DecoderWeights | DecoderLayer) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        return {name: v.float() for name, v in values.items() if isinstance(v, torch.Tensor)}

    layers = tuple(replace(layer, **wide(layer)) for layer in weights.layers)
    return replace(weights, layers=layers, **wide(weights))


def test_a_decoder_of_resident_weights(rng: torch.Generator) -> None:
    """A prompt beside a decode step, then one sequence alone: both round as often as the reference
    does, at other places, so they are as near to the float32 oracle."""
    shape = Shape(heads=2, kv_heads=1, head_dim=32, hidden=128, inner=128)
    weights = draw_weights(rng, shape, torch.bfloat16)
    table = TritonOps(4)

    def form(weight: Weight) -> ResidentMatrix:
        assert isinstance(weight, torch.Tensor)
        return resident(weight)

    layers = tuple(
        replace(
            layer,
            qkv=form(layer.qkv),
            output=form(layer.output),
            gate_up=form(layer.gate_up),
            down=form(layer.down),
        )
        for layer in weights.layers
    )
    embedding = form(weights.embedding)
    packed_weights = replace(weights, embedding=embedding, layers=layers, head=embedding)
    ops = replace(
        reference_ops(),
        embed=table.embed,
        linear=table.linear,
        logits=table.logits,
        gate_up=table.gate_up,
        silu_mul=table.silu_mul,
    )
    for lens in ([(1, 20), (3, 9)], [(1, 5)]):
        step = draw_step(rng, shape, torch.bfloat16, lens)
        keys, values = step.cache
        in_float32 = replace(step, cache=(keys.float(), values.float()))
        oracle = in_float32.run(partial(decoder, reference_ops(), widened(weights)))[0]
        theirs = step.run(partial(decoder, reference_ops(), weights))[0]
        ours = step.run(partial(decoder, ops, packed_weights))[0]
        assert float((ours - oracle).norm()) < 2 * float((theirs - oracle).norm())


def test_dense_weights_are_multiplied_as_ever(rng: torch.Generator) -> None:
    ops = TritonOps(4)
    weight: Weight = torch.randn(6, 64, generator=rng).half()
    x = torch.randn(2, 64, generator=rng).half()
    assert torch.equal(ops.linear(x, weight, None), ops.dense_linear(x, weight, None))
    assert torch.equal(ops.embed(weight, torch.tensor([5, 0])), weight[[5, 0]])
