"""The resident form keeps every bit: made and undone by the reference, and made natively alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import native

from kernels.native.resident import SAMPLE_WEIGHTS
from kernels.native.resident import pack as native_pack
from kernels.reference.resident import dense, pack, unpack
from kernels.resident import PALETTE, ResidentMatrix, Weight, escape_room, may_pack

PARTS = ("palette", "tiles", "starts", "escapes")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """[N, K] bfloat16 as its patterns, which unlike NaN compare."""
    return tensor.contiguous().view(torch.int16)


def of_patterns(patterns: torch.Tensor) -> torch.Tensor:
    """Patterns of 16 bits, as any integers, as bfloat16."""
    return patterns.to(torch.int32).to(torch.int16).view(torch.bfloat16)


def draw(rng: torch.Generator, rows: int, columns: int, strange: float = 0.002) -> torch.Tensor:
    """Like a trained matrix, with a ``strange`` share of far exponents."""
    weight = (torch.randn(rows, columns, generator=rng) / columns**0.5).bfloat16()
    weight[torch.rand(rows, columns, generator=rng) < strange] *= 1e-25
    return weight


def both(weight: torch.Tensor, threads: int = 2) -> Weight:
    """``weight`` in the form, which the native code and the reference make alike, bit for bit."""
    native_one = native_pack(native("portable", threads).context, weight)
    reference = pack(weight)
    if isinstance(reference, torch.Tensor):
        assert native_one is reference is weight
        return weight
    assert isinstance(native_one, ResidentMatrix)
    assert native_one.shape == reference.shape == weight.shape
    for part in PARTS:
        assert torch.equal(getattr(native_one, part), getattr(reference, part)), part
    return native_one


# Whole tiles and groups, and every kind of rest.
@pytest.mark.parametrize(
    "shape", [(4, 64), (64, 576), (37, 1536), (131, 577), (49, 63), (202, 190)]
)
def test_every_bit_comes_back(shape: tuple[int, int], rng: torch.Generator) -> None:
    weight = draw(rng, *shape)
    for threads in (1, 3):
        packed = both(weight, threads)
        assert isinstance(packed, ResidentMatrix)
        assert torch.equal(bits(unpack(packed)), bits(weight))
        assert packed.nbytes < weight.nbytes
        assert weight.numel() < 10_000 or len(packed.escapes) > 0


def test_all_patterns_of_16_bits_are_kept(rng: torch.Generator) -> None:
    """NaNs of every payload, infinities, subnormals and both zeros among ordinary weights."""
    patterns = torch.arange(65536)[torch.randperm(65536, generator=rng)]
    weight = draw(rng, 2304, 1024, 0.0)
    places = torch.randperm(weight.numel(), generator=rng)[:65536]
    weight.view(-1)[places] = of_patterns(patterns)
    packed = both(weight)
    assert isinstance(packed, ResidentMatrix)
    restored = bits(unpack(packed)).view(-1)
    assert torch.equal(restored, bits(weight).view(-1))
    assert len(restored[places].unique()) == 65536


def test_it_goes_to_a_device_all_but_its_palette(rng: torch.Generator) -> None:
    packed = both(draw(rng, 64, 576))
    assert isinstance(packed, ResidentMatrix)
    assert packed.to(torch.device("cpu")) is packed
    moved = packed.to(torch.device("meta"))
    assert moved.shape == packed.shape
    assert moved.palette is packed.palette
    assert {t.device.type for t in (moved.tiles, moved.starts, moved.escapes)} == {"meta"}


@pytest.mark.parametrize(
    "pattern", [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x3F80]
)
def test_constant_matrices(pattern: int) -> None:
    weight = of_patterns(torch.full((9, 70), pattern))
    packed = both(weight)
    if isinstance(packed, ResidentMatrix):
        assert not len(packed.escapes)
    assert torch.equal(bits(dense(packed)), bits(weight))


def test_a_matrix_of_exponents_beyond_any_palette_stays_as_it_is(rng: torch.Generator) -> None:
    patterns = torch.randint(0, 65536, (64, 256), generator=rng)
    assert isinstance(both(of_patterns(patterns)), torch.Tensor)


def test_the_last_escape_that_fits_and_the_first_that_does_not(rng: torch.Generator) -> None:
    rows, columns = 64, 256
    room = escape_room(rows, columns)
    usual = torch.randint(100, 100 + PALETTE, (rows * columns,), generator=rng) << 7
    for count, fits in ((room, True), (room + 1, False)):
        patterns = usual.clone()
        places = torch.randperm(rows * columns, generator=rng)[:count]
        # Each rare exponent less often than any usual one.
        patterns[places] = (150 + torch.arange(count) % 64) << 7
        weight = of_patterns(patterns.view(rows, columns))
        packed = both(weight)
        assert isinstance(packed, ResidentMatrix) == fits
        assert torch.equal(bits(dense(packed)), bits(weight))


def test_a_row_of_nothing_but_escapes(rng: torch.Generator) -> None:
    weight = draw(rng, 130, 192, 0.0)
    weight[77] = of_patterns((torch.arange(192) % 96) << 7)
    packed = both(weight)
    assert isinstance(packed, ResidentMatrix)
    assert len(packed.escapes) >= 192 - 2 * PALETTE  # some fill the palette up
    assert torch.equal(bits(unpack(packed)), bits(weight))


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(0, 64, dtype=torch.bfloat16),
        torch.zeros(64, 0, dtype=torch.bfloat16),
        torch.zeros(1, 1, dtype=torch.bfloat16),
        torch.zeros(3, 64, dtype=torch.bfloat16).expand(3, 64)[:, ::2],
        torch.zeros(64, 64),
        torch.zeros(64, 64, dtype=torch.float16),
        torch.zeros(4, 4, 64, dtype=torch.bfloat16),
    ],
    ids=["no-rows", "no-columns", "one", "strided", "float32", "float16", "three-dimensional"],
)
def test_what_the_form_is_not_for_stays_as_it_is(weight: torch.Tensor) -> None:
    assert not may_pack(weight)
    assert both(weight) is weight


def test_rows_of_a_larger_matrix(rng: torch.Generator) -> None:
    whole = draw(rng, 40, 300)
    part = whole[3:35, 17:273]
    assert not part.is_contiguous()
    assert torch.equal(bits(dense(both(part))), bits(part))


def test_exponents_that_the_sample_missed_are_escapes(rng: torch.Generator) -> None:
    """Of a large matrix not every row is counted to choose the palette."""
    columns = 4096
    rows = 2 * SAMPLE_WEIGHTS // columns
    weight = of_patterns(torch.randint(96, 96 + PALETTE, (rows, columns)) << 7)
    weight[1, :50] = 1e30
    packed = native_pack(native("portable").context, weight)
    assert isinstance(packed, ResidentMatrix)
    assert len(packed.escapes) == 50
    assert torch.equal(bits(unpack(packed)), bits(weight))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    base=st.integers(0, 255),
    spread=st.integers(0, 24),
    share=st.sampled_from([0.0, 0.01, 0.1]),
    seed=st.integers(0, 2**32),
)
def test_any_matrix_comes_back(
    rows: int, columns: int, base: int, spread: int, share: float, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)

    def integers(high: int) -> torch.Tensor:
        return torch.randint(0, high, (rows, columns), generator=rng)

    near = (integers(2) << 15) | ((base + integers(spread + 1)) % 256 << 7) | integers(128)
    strange = torch.rand(rows, columns, generator=rng) < share
    weight = of_patterns(torch.where(strange, integers(65536), near))
    assert torch.equal(bits(dense(both(weight))), bits(weight))
