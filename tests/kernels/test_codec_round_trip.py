"""Every bit comes back, whoever encoded and whoever decodes, and all write the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from codec_cases import DTYPES, SPECIAL, Codec, as_bytes, codecs, weights
from hypothesis import given
from hypothesis import strategies as st

from kernels import codec
from kernels.codec.layout import (
    FLOAT_TYPES,
    MIN_SAVING,
    RAW_TILE_BYTES,
    TILE_VALUES,
    Bytes,
    CodecError,
)

CODECS = codecs()
GUARD = 64


def decoded(which: object, block: bytes, size: int, threads: int = 1) -> Bytes:
    """``block`` decoded by ``which``, after which the memory around it is as it was."""
    around = np.full(size + 2 * GUARD, 0xA5, np.uint8)
    which.decode_into(as_bytes(block), around[GUARD : GUARD + size], threads)  # type: ignore[attr-defined]
    assert (around[:GUARD] == 0xA5).all()
    assert (around[GUARD + size :] == 0xA5).all()
    return around[GUARD : GUARD + size]


def check_everywhere(data: Bytes, dtype: str, threads: int = 1) -> bytes:
    """One block of ``data``, the same from all; decoded by all."""
    blocks = [which.encode(data, dtype, threads) for which in CODECS]
    for which, block in zip(CODECS, blocks, strict=True):
        assert block == blocks[0], which.isa
        assert which.check(as_bytes(block)) == len(data)
        assert np.array_equal(decoded(which, block, len(data), threads), data), which.isa
    return blocks[0]


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(name: str, dtype: str) -> None:
    block = check_everywhere(SPECIAL[name](), dtype)
    assert len(block) <= len(SPECIAL[name]()) + 20 + 4 * 9


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, Bytes]:
    """A dtype, and values with few or many exponents in any proportion."""
    dtype = draw(st.sampled_from(DTYPES))
    kind = FLOAT_TYPES[dtype]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.one_of(st.integers(0, 200), st.integers(0, 70_000)))
    distinct = draw(st.integers(1, 1 << kind.exponent_bits))
    exponents = rng.permutation(1 << kind.exponent_bits)[:distinct]
    skew = draw(st.sampled_from((0.0, 0.5, 1.0, 3.0)))
    odds = 1.0 / np.arange(1, distinct + 1) ** skew
    exponent = rng.choice(exponents, count, p=odds / odds.sum())
    width = 8 * kind.bytes
    values = rng.integers(0, 1 << width, count)
    mask = ((1 << kind.exponent_bits) - 1) << kind.mantissa_bits
    values = (values & ~mask) | (exponent << kind.mantissa_bits)
    return dtype, as_bytes(values.astype("<u2" if kind.bytes == 2 else np.uint8))


@given(tensors())
def test_any_values(tensor: tuple[str, Bytes]) -> None:
    dtype, data = tensor
    check_everywhere(data, dtype)


@given(st.binary(max_size=300), st.sampled_from((*DTYPES, "int8", "")))
def test_any_bytes(data: bytes, dtype: str) -> None:
    kind = FLOAT_TYPES.get(dtype)
    check_everywhere(as_bytes(data[: len(data) // 2 * 2] if kind else data), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: str) -> None:
    data = weights(150_001, dtype)
    assert check_everywhere(data, dtype, threads=3) == check_everywhere(data, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_near_to_what_their_entropy_allows(dtype: str) -> None:
    data = weights(1_000_000, dtype)
    kind = FLOAT_TYPES[dtype]
    values = data.view("<u2") if kind.bytes == 2 else data
    counts = np.bincount(values >> kind.mantissa_bits & (1 << kind.exponent_bits) - 1)
    odds = counts[counts > 0] / len(values)
    entropy_bits = kind.mantissa_bits + 1 - (odds * np.log2(odds)).sum()
    block = codec.encode(data, dtype)
    found = codec.describe(block)
    assert found.raw_reason is None
    assert found.codec == "rans/1"
    assert found.bits_per_value == pytest.approx(8 * len(block) / len(values))
    # Within one part in a hundred of the limit; and the limit that a block states is nearly this.
    assert entropy_bits <= found.bits_per_value <= 1.01 * entropy_bits
    assert found.limit_bits_per_value == pytest.approx(entropy_bits, rel=2e-3)


def test_a_piece_of_16_kib_pays_little_for_its_header() -> None:
    block = codec.encode(weights(8192), "bfloat16")
    assert codec.describe(block).bits_per_value < 1.025 * codec.describe(block).limit_bits_per_value


def test_what_is_raw_says_why() -> None:
    noise = np.random.default_rng(1).integers(0, 256, 4096).astype(np.uint8)
    for data, dtype, reason in (
        (noise, "bfloat16", "a 64th"),
        (noise, "int8", "no exponents"),
        (as_bytes(b""), "bfloat16", "no values"),
        (weights(100), "bfloat16", "a 64th"),
    ):
        found = codec.describe(codec.encode(data, dtype))
        assert found.codec == "raw/1"
        assert reason in str(found.raw_reason)
        assert found.decoded_bytes == len(data)


def test_a_coded_block_saves_what_it_must() -> None:
    rng = np.random.default_rng(5)
    for spread in range(2, 200, 3):
        values = rng.integers(0, spread, 20_000) << 7 | rng.integers(0, 128, 20_000)
        data = as_bytes(values.astype("<u2"))
        block = codec.encode(data, "bfloat16")
        if codec.describe(block).raw_reason is None:
            assert len(block) <= len(data) - len(data) // MIN_SAVING


def test_escapes_are_counted() -> None:
    values = np.full(50_000, 0x3C11)
    values[::1000] = np.arange(50) << 7
    block = codec.encode(as_bytes(values.astype("<u2")), "bfloat16")
    assert codec.describe(block).escapes == 50 - 15 + 1


def test_blocks_follow_one_another() -> None:
    parts = [weights(5000, seed=1), as_bytes(b""), weights(40_000, seed=2)]
    stream = b"".join(codec.encode(part, "bfloat16") for part in parts)
    for part in parts:
        size = codec.block_bytes(stream)
        out = np.empty(codec.decoded_bytes(stream[:size]), np.uint8)
        codec.decode_into(stream[:size], out)
        assert np.array_equal(out, part)
        stream = stream[size:]
    assert stream == b""


@pytest.mark.parametrize("which", CODECS, ids=lambda which: which.isa)
def test_a_run_of_blocks_fills_its_memory(which: Codec) -> None:
    """Coded and raw ones, of one row, of a part of a tile and of more than are decoded at once;
    what is behind the last one does not count."""
    counts = (32, 5000) if which.isa == "reference" else (32, 5000, 5 * TILE_VALUES + 7)
    parts = [weights(count, seed=count) for count in counts]
    parts += [as_bytes(np.random.default_rng(4).bytes(3 * RAW_TILE_BYTES + 5)), weights(99)]
    dtypes = [*("bfloat16" for _ in counts), "", "bfloat16"]
    blocks = [which.encode(part, dtype, 1) for part, dtype in zip(parts, dtypes, strict=True)]
    expected = np.concatenate(parts)
    around = np.full(len(expected) + 2 * GUARD, 0xA5, np.uint8)
    out = around[GUARD:-GUARD]
    which.decode_run(as_bytes(b"".join(blocks) + bytes(77)), out)
    assert np.array_equal(out, expected)
    assert (around[:GUARD] == 0xA5).all()
    assert (around[-GUARD:] == 0xA5).all()


@pytest.mark.parametrize("which", CODECS, ids=lambda which: which.isa)
def test_a_run_that_does_not_fit_is_refused(which: Codec) -> None:
    blocks = which.encode(weights(64), "bfloat16", 1) + which.encode(weights(32), "bfloat16", 1)
    for stored, size in (
        (blocks, 191),  # the last one is longer than what is left
        (blocks, 193),  # nothing comes after it
        (blocks[:-1], 192),
        (blocks[:20], 192),
        (which.encode(as_bytes(b""), "", 1) + blocks, 192),  # would go on for ever
        (b"", 1),
    ):
        around = np.full(size + 2 * GUARD, 0xA5, np.uint8)
        with pytest.raises(CodecError):
            which.decode_run(as_bytes(stored), around[GUARD : GUARD + size])
        assert (around[:GUARD] == 0xA5).all()
        assert (around[GUARD + size :] == 0xA5).all()


def test_memory_of_any_kind_and_at_any_address() -> None:
    data = weights(3000)
    block = codec.encode(data.view("<u2").reshape(30, 100), "bfloat16")
    assert (
        block
        == codec.encode(data.tobytes(), "bfloat16")
        == codec.encode(bytearray(data), "bfloat16")
    )
    for shift in (1, 2, 3):
        moved = as_bytes(bytes(shift) + block)[shift:]
        out = np.empty(6000 + shift, np.uint8)[shift:]
        codec.decode_into(memoryview(moved), memoryview(out))
        assert np.array_equal(out, data)
        assert codec.encode(as_bytes(bytes(shift) + bytes(data))[shift:], "bfloat16") == block


def test_impossible_arguments_are_refused() -> None:
    data = weights(64).view("<u2").reshape(8, 8)
    with pytest.raises(ValueError, match="data is not contiguous"):
        codec.encode(data[:, :4], "bfloat16")
    with pytest.raises(ValueError, match="17 bytes are no whole number of float16"):
        codec.encode(bytes(17), "float16")
    with pytest.raises(ValueError, match="threads is 0"):
        codec.encode(data, "bfloat16", threads=0)
    block = codec.encode(data, "bfloat16")
    with pytest.raises(ValueError, match="cannot be written"):
        codec.decode_into(block, bytes(128))
    with pytest.raises(ValueError, match="out is not contiguous"):
        codec.decode_into(block, np.empty((16, 16), np.uint8)[:, :8])
    with pytest.raises(codec.CodecError, match="a block of 128 bytes does not fit into 127"):
        codec.decode_into(block, bytearray(127))
