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
from kernels.triton import exponent_codec
from kernels.triton.exponent_codec import decode_block

sys.path.insert(0, str(Path(__file__).parents[1]))
from codec_cases import DTYPES, SPECIAL, as_bytes, weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows to a tile."""
    monkeypatch.setattr(layout, "TILE_VALUES", 96)
    monkeypatch.setattr(reference, "TILE_VALUES", 96)


def with_escapes(data: Bytes, dtype: str = "bfloat16") -> Bytes:
    """``data`` with every 37th exponent anything."""
    width = layout.FLOAT_TYPES[dtype].bytes
    data[width - 1 :: 37 * width] = np.arange(len(data[width - 1 :: 37 * width])) * 8 // width % 128
    return data


def coded(data: Bytes, dtype: str) -> bytes:
    """A coded block, even where that saves nothing."""
    return reference.encode_rans(data, layout.FLOAT_TYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 95, 96, 97, 500, 96 * 8, 96 * 9 + 3])
def test_values_come_back(count: int, dtype: str) -> None:
    data = with_escapes(weights(count, dtype), dtype)
    block = coded(data, dtype)
    assert decode_block(block, CPU).numpy().tobytes() == data.tobytes()


ODD = ("nothing", "one", "NaN payloads", "every pattern", "a constant tensor", "all escapes")
CASES = [("bfloat16", name) for name in SPECIAL if "weights" not in name]
CASES += [(dtype, name) for dtype in DTYPES[1:] for name in ODD]


@pytest.mark.parametrize(("dtype", "name"), CASES)
def test_special_values(dtype: str, name: str) -> None:
    """Bits of bfloat16 as they come: the other dtypes find other oddities in them."""
    data = SPECIAL[name]()[-1500:]
    block = coded(data, dtype) if len(data) else reference.encode(data, dtype)
    assert decode_block(block, CPU).numpy().tobytes() == data.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each NaN and each subnormal at tiles enough to go side by side."""
    monkeypatch.setattr(layout, "TILE_VALUES", 1024)
    monkeypatch.setattr(reference, "TILE_VALUES", 1024)
    monkeypatch.setattr(exponent_codec, "TILES", 64)
    wide = layout.FLOAT_TYPES[dtype].bytes == 2
    patterns = np.arange(65536, dtype="<u2") if wide else np.arange(2560).astype(np.uint8)
    data = as_bytes(patterns)
    assert decode_block(coded(data, dtype), CPU).numpy().tobytes() == data.tobytes()


def test_a_raw_block_is_copied() -> None:
    noise = as_bytes(np.random.default_rng(3).integers(0, 65536, 300).astype("<u2"))
    for dtype in (*DTYPES, "int32"):
        for data in (noise, noise[:0]):
            block = reference.encode(data, dtype)
            assert block[5] == layout.RAW
            assert decode_block(block, CPU).numpy().tobytes() == data.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_damage_is_noticed(dtype: str) -> None:
    block = coded(with_escapes(weights(225, dtype), dtype), dtype)
    rng = random.Random(4)
    width = layout.FLOAT_TYPES[dtype].bytes
    head = layout.header_bytes(layout.RANS, 225 * width, width)
    planes = reference.planes_bytes(225, layout.FLOAT_TYPES[dtype])
    entries = reference.directory(as_bytes(block), head)
    at, known = head + 4 + planes, []  # padding is of no interest to a GPU
    for words, escapes, _ in entries:
        known += range(at, at + 128 + 2 * words + escapes)
        at += -(-(128 + 2 * words + escapes) // 4) * 4
    for place in [
        *range(16, head, 16),
        *rng.sample(known, 9),
        *range(head + 4, head + 4 + planes, 60),
    ]:
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
