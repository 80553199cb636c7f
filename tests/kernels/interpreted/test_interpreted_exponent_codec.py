"""Blocks decoded by Triton against the values that went in. Tiles are small here: a row of the
interpreter costs as much as a million rows of a GPU."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.codec import CodecError, layout
from kernels.codec.layout import Bytes
from kernels.reference import exponent_codec as reference
from kernels.triton.exponent_codec import decode_block

sys.path.insert(0, str(Path(__file__).parents[1]))
from codec_cases import SPECIAL, as_bytes, weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows to a tile."""
    monkeypatch.setattr(layout, "TILE_VALUES", 96)
    monkeypatch.setattr(reference, "TILE_VALUES", 96)


def with_escapes(data: Bytes) -> Bytes:
    """``data`` with every 37th exponent anything."""
    data[1::74] = np.arange(len(data[1::74])) % 128
    return data


def coded(data: Bytes, dtype: str) -> bytes:
    """A coded block, even where that saves nothing."""
    return reference.encode_rans(data, layout.FLOAT_TYPES[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 95, 96, 97, 500, 96 * 8, 96 * 9 + 1])
def test_values_come_back(count: int, dtype: str) -> None:
    data = with_escapes(weights(count, dtype))
    block = coded(data, dtype)
    assert decode_block(block, CPU).numpy().tobytes() == data.tobytes()


@pytest.mark.parametrize("name", [name for name in SPECIAL if "weights" not in name])
def test_special_values(name: str) -> None:
    data = SPECIAL[name]()[-3000:]
    block = coded(data, "bfloat16") if len(data) else reference.encode(data, "bfloat16")
    assert decode_block(block, CPU).numpy().tobytes() == data.tobytes()


def test_a_raw_block_is_copied() -> None:
    noise = as_bytes(np.random.default_rng(3).integers(0, 65536, 300).astype("<u2"))
    for data in (noise, noise[:0]):
        block = reference.encode(data, "bfloat16")
        assert block[5] == layout.RAW
        assert decode_block(block, CPU).numpy().tobytes() == data.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_damage_is_noticed(dtype: str) -> None:
    block = coded(with_escapes(weights(225, dtype)), dtype)
    rng = random.Random(4)
    head = layout.header_bytes(layout.RANS, 450, 2)
    planes = reference.planes_bytes(225, layout.FLOAT_TYPES[dtype])
    entries = reference.directory(as_bytes(block), head)
    at, known = head + 4 + planes, []  # padding is of no interest to a GPU
    for words, escapes, _ in entries:
        known += range(at, at + 128 + 2 * words + escapes)
        at += -(-(128 + 2 * words + escapes) // 4) * 4
    for place in [*range(16, head, 16), *rng.sample(known, 9), *range(head + 4, head + 225, 60)]:
        damaged = bytearray(block)
        damaged[place] ^= 1 << rng.randrange(8)
        with pytest.raises(CodecError):
            decode_block(bytes(damaged), CPU)


def test_a_section_that_is_too_short_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header agrees with itself, but not with the states."""
    monkeypatch.setattr(layout, "TILE_VALUES", 640)
    monkeypatch.setattr(reference, "TILE_VALUES", 640)
    block = bytearray(coded(with_escapes(weights(640)), "bfloat16"))
    head = layout.header_bytes(layout.RANS, 1280, 2)
    words, escapes, _ = reference.directory(as_bytes(bytes(block)), head)[0]
    for fewer, more in ((2, 4), (20, 40), (-2, -4)):
        entry = (words - fewer).to_bytes(4, "little") + (escapes + more).to_bytes(4, "little")
        block[head - 12 : head - 4] = entry
        agreed = reference.checksum(as_bytes(bytes(block[:head])))
        block[head : head + 4] = agreed.to_bytes(4, "little")
        with pytest.raises(CodecError, match="content is damaged"):
            decode_block(bytes(block), CPU)


def test_values_of_8_bits_are_refused() -> None:
    block = coded(weights(90, "float8_e5m2"), "float8_e5m2")
    with pytest.raises(ValueError, match="only values of 16 bits"):
        decode_block(block, CPU)
