"""A damaged block is an error: never another weight, never a byte outside of what was given."""

from __future__ import annotations

import random

import numpy as np
import pytest
from codec_cases import DTYPES, Codec, as_bytes, codecs, weights

from kernels import codec
from kernels.codec.layout import (
    CHECKSUM_BYTES,
    FLOAT_TYPES,
    HEADER,
    LANES,
    RANS,
    TABLE,
    CodecError,
    header_bytes,
)
from kernels.reference.exponent_codec import checksum, directory, planes_bytes

CODECS = codecs()


def sound_block(dtype: str = "bfloat16", count: int = 3001) -> tuple[bytes, int]:
    """A coded block with escapes, and its decoded size."""
    data = weights(count, dtype)
    data[::97] = np.arange(len(data[::97])) % 256
    block = CODECS[-1].encode(data, dtype, 1)
    assert block[5] == RANS
    return block, len(data)


def refuses(which: Codec, block: bytes, size: int) -> None:
    """``which`` must raise, and keep its hands off the memory around the output."""
    around = np.full(size + 128, 0xA5, np.uint8)
    with pytest.raises(CodecError):
        which.decode_into(as_bytes(block), around[64 : 64 + size], 1)
    assert (around[:64] == 0xA5).all()
    assert (around[64 + size :] == 0xA5).all()


@pytest.mark.parametrize("which", CODECS, ids=lambda which: which.isa)
@pytest.mark.parametrize("dtype", [*DTYPES, "raw"])
def test_every_flipped_bit_is_noticed(which: Codec, dtype: str) -> None:
    block, size = sound_block(dtype) if dtype != "raw" else (which.encode(weights(99), "", 1), 198)
    rng = random.Random(dtype)
    head = header_bytes(block[5], size, 1) + CHECKSUM_BYTES
    samples = 60 if which.isa == "reference" else 600
    places = {*range(min(head, samples // 2)), len(block) - 1}
    places |= {rng.randrange(len(block)) for _ in range(samples)}
    for place in places:
        damaged = bytearray(block)
        damaged[place] ^= 1 << rng.randrange(8)
        refuses(which, bytes(damaged), size)


@pytest.mark.parametrize("which", CODECS, ids=lambda which: which.isa)
def test_cut_off_or_too_long_is_noticed(which: Codec) -> None:
    block, size = sound_block()
    rng = random.Random(1)
    for length in {*range(40), *(rng.randrange(len(block)) for _ in range(100)), len(block) - 1}:
        refuses(which, block[:length], size)
    refuses(which, block + b"\0", size)
    refuses(which, block, size + 1)
    refuses(which, block, size - 1)


def test_two_flipped_bits_are_noticed() -> None:
    """Wherever they are: a checksum that multiplies once a round misses bits 16 and 29 of
    neighbouring words, and of neighbouring rows."""
    which = CODECS[-1]
    block = which.encode(weights(128), "", 1)
    rng = random.Random(2)
    at = len(block) - 256
    pairs = [
        (word * 32 + 16, (word + step) * 32 + 29) for step in (1, 16) for word in range(64 - step)
    ]
    pairs += [tuple(rng.sample(range(2048), 2)) for _ in range(3000)]
    for pair in pairs:
        damaged = bytearray(block)
        for bit in pair:
            damaged[at + bit // 8] ^= 1 << bit % 8
        refuses(which, bytes(damaged), 256)


def forged(block: bytes, place: int, content: bytes, size: int) -> bytes:
    """``block`` with ``content`` at ``place`` and a header checksum that agrees."""
    head = header_bytes(RANS, size, 2)
    changed = block[:place] + content + block[place + len(content) :]
    agreed = checksum(as_bytes(changed[:head])).to_bytes(4, "little")
    return changed[:head] + agreed + changed[head + 4 :]


@pytest.mark.parametrize("which", CODECS, ids=lambda which: which.isa)
def test_a_header_that_lies_is_noticed(which: Codec) -> None:
    """Checksums agree, so that only the other checks stand between it and memory."""
    block, size = sound_block(count=70_001)
    frequencies, directory = HEADER.size + 16, HEADER.size + TABLE.size
    first = int.from_bytes(block[frequencies : frequencies + 2], "little")
    lies = [
        *((6, bytes([code])) for code in (0, 2, 3, 4, 5, 255)),
        *((7, bytes([detail])) for detail in (0, 1, 15, 16, 17, 127, 128, 129, 255)),
        *((8, number.to_bytes(4, "little")) for number in (0, 1, size - 2, size + 2, 2**32 - 1)),
        (frequencies, (first + 1).to_bytes(2, "little")),
        (frequencies, (0).to_bytes(2, "little")),
        (frequencies, (65535).to_bytes(2, "little")),
        (frequencies + 30, (0).to_bytes(2, "little")),
        *((directory + at, number.to_bytes(4, "little")) for at in (0, 4, 12, 24, 28)
          for number in (0, 1, 32769, 2**31, 2**32 - 1)),
    ]  # fmt: skip
    rng = random.Random(7)
    lies += [
        (rng.randrange(6, directory + 36), rng.randbytes(rng.randrange(1, 5))) for _ in range(100)
    ]
    for place, content in lies:
        if block[place : place + len(content)] != content:
            lie = forged(block, place, content, size)
            refuses(which, lie, size)


@pytest.mark.parametrize("which", CODECS, ids=lambda which: which.isa)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_holds_zeros_alone(which: Codec, dtype: str) -> None:
    """What fills up planes and sections says nothing, but is no place to hide anything either."""
    kind, count = FLOAT_TYPES[dtype], 3001
    block, size = sound_block(dtype, count)
    head = header_bytes(RANS, size, kind.bytes)
    at = end = head + CHECKSUM_BYTES
    padding = []
    for width in kind.plane_widths:
        at += -(-count * width // 8)
        padding += [8 * at - 1 - bit for bit in range(-count * width % 8)]
    end += planes_bytes(count, kind)
    words, escapes, _ = directory(as_bytes(block), head)[0]
    used = end + 4 * LANES + 2 * words + escapes
    padding += [*range(8 * at, 8 * end, 3), *range(8 * used, 8 * len(block), 3)]
    for bit in padding:
        damaged = bytearray(block)
        assert not damaged[bit // 8] >> bit % 8 & 1
        damaged[bit // 8] ^= 1 << bit % 8
        refuses(which, bytes(damaged), size)


@pytest.mark.parametrize("which", CODECS, ids=lambda which: which.isa)
def test_a_word_too_many_is_noticed(which: Codec) -> None:
    """Made of padding, so that nothing but the count of words is wrong."""
    for count in range(3000, 3100):
        block = which.encode(weights(count), "bfloat16", 1)
        head = header_bytes(RANS, 2 * count, 2)
        words, escapes, _ = directory(as_bytes(block), head)[0]
        if escapes == 0 and words % 2 == 1:
            lie = forged(block, head - 12, (words + 1).to_bytes(4, "little"), 2 * count)
            refuses(which, lie, 2 * count)
            return
    pytest.fail("no block with an odd number of words and no escapes")


@pytest.mark.parametrize("which", CODECS, ids=lambda which: which.isa)
@pytest.mark.parametrize("what", ["words", "escapes"])
def test_a_section_with_more_than_its_rows_take_is_noticed(which: Codec, what: str) -> None:
    """The block has the room that it claims: more than the last row, or all, could use."""
    block, size = sound_block()
    head = header_bytes(RANS, size, 2)
    words, escapes, _ = directory(as_bytes(block), head)[0]
    for more in (4, 32, 64, 68, 200, 2000, 8000):
        longer = bytearray(block + bytes(2 * more if what == "words" else more))
        longer[12:16] = len(longer).to_bytes(4, "little")
        place, count = (head - 12, words) if what == "words" else (head - 8, escapes)
        refuses(
            which, forged(bytes(longer), place, (count + more).to_bytes(4, "little"), size), size
        )


@pytest.mark.parametrize("which", CODECS, ids=lambda which: which.isa)
def test_a_body_of_noise_is_noticed(which: Codec) -> None:
    block, size = sound_block()
    rng = random.Random(3)
    head = header_bytes(RANS, size, 2) + CHECKSUM_BYTES
    for _ in range(30 if which.isa == "reference" else 300):
        begin = rng.randrange(head, len(block))
        refuses(which, block[:begin] + rng.randbytes(len(block) - begin), size)


def test_what_is_no_block_is_noticed() -> None:
    for data in (b"", b"pmxc", bytes(20), b"pmxc\x02" + bytes(15)):
        with pytest.raises(CodecError):
            codec.decoded_bytes(data)
        with pytest.raises(CodecError):
            codec.block_bytes(data)
        with pytest.raises(CodecError):
            codec.describe(data)
