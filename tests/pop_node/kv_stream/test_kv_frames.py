"""Frames: golden bytes, any way of cutting the stream, and garbage."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.kv_stream.frames import (
    MAX_COMMIT_IDS,
    MAX_HEADER_BYTES,
    MAX_PLACES,
    PREFIX,
    Abort,
    Ack,
    Commit,
    Data,
    Deny,
    Done,
    FrameReader,
    Goodbye,
    Grant,
    Hello,
    Message,
    Open,
    Ping,
    Pong,
    data_checksum,
    encode,
    receiver_decoder,
    sender_decoder,
)
from pop_node.kv_stream.prompt import prompt_digest
from pop_node.kv_stream.spec import Piece
from wire.errors import PeerError

T = bytes(range(16))
D = bytes(range(16, 32))
SLOT = 4096 + 100

# What version 1 looks like on the wire. A change here breaks nodes of the version before.
GOLDEN_1 = [
    (
        Hello(1, 2, "mesh", "n", "AMS", "i", 65536),
        "160000000000000098010102a46d657368a16ea3414d53a169ce00010000",
    ),
    (Goodbye("code", "text"), "0c000000000000009302a4636f6465a474657874"),
    (Ping(7), "0300000000000000920307"),
    (Pong(300), "05000000000000009204cd012c"),
    (
        Open(T, 1, "m", "id", D, 9, D, ["raw"]),
        "4400000000000000"
        "9910c410000102030405060708090a0b0c0d0e0f01a16da26964c410101112131415161718191a1b1c1d1e1f09"
        "c410101112131415161718191a1b1c1d1e1f91a3726177",
    ),
    (
        Commit(T, 1, [5, 70000], D),
        "2e00000000000000"
        "9512c410000102030405060708090a0b0c0d0e0f019205ce00011170"
        "c410101112131415161718191a1b1c1d1e1f",
    ),
    (
        Grant(T, 1, 65536, 3, "raw"),
        "1f000000000000009620c410000102030405060708090a0b0c0d0e0f01ce0001000003a3726177",
    ),
    (
        Deny(T, 1, "c", "m", True),
        "1a000000000000009621c410000102030405060708090a0b0c0d0e0f01a163a16dc3",
    ),
    (Ack(T, 1, 0, 65536), "1b000000000000009522c410000102030405060708090a0b0c0d0e0f0100ce00010000"),
    (Done(T, 1), "15000000000000009323c410000102030405060708090a0b0c0d0e0f01"),
    (Abort(T, 1, "c", "m"), "19000000000000009530c410000102030405060708090a0b0c0d0e0f01a163a16d"),
]


def reader(decoder=receiver_decoder, sink=None):
    return FrameReader(decoder(), SLOT, sink or (lambda data, nbytes: None))


def feed(r: FrameReader, stream: bytes, cuts: list[int]) -> list:
    """Give the reader ``stream`` in pieces of the sizes ``cuts``, repeated."""
    messages, at, turn = [], 0, 0
    while at < len(stream):
        buffer = r.get_buffer()
        size = min(len(buffer), len(stream) - at, cuts[turn % len(cuts)])
        buffer[:size] = stream[at : at + size]
        messages += r.received(size)
        at, turn = at + size, turn + 1
    return messages


# Frames that version 2 changed, by appending to them.
GOLDEN_2 = [
    (
        Hello(1, 2, "mesh", "n", "AMS", "i", 65536, 3),
        "170000000000000099010102a46d657368a16ea3414d53a169ce0001000003",
    ),
    (
        Open(T, 1, "m", "id", D, 9, D, ["raw"], True),
        "4500000000000000"
        "9a10c410000102030405060708090a0b0c0d0e0f01a16da26964c410101112131415161718191a1b1c1d1e1f09"
        "c410101112131415161718191a1b1c1d1e1f91a3726177c3",
    ),
    (
        Grant(T, 1, 65536, 3, "raw", [3, 300]),
        "24000000000000009720c410000102030405060708090a0b0c0d0e0f01ce0001000003a37261779203cd012c",
    ),
]


def decoded(message: Message, frame: str) -> list:
    decoder = sender_decoder if isinstance(message, Grant | Deny | Ack | Done) else receiver_decoder
    return feed(reader(decoder), bytes.fromhex(frame), [1])


@pytest.mark.parametrize(("message", "frame"), GOLDEN_1, ids=lambda m: type(m).__name__)
def test_golden_of_version_1(message: Message, frame: str) -> None:
    assert decoded(message, frame) == [message]
    if type(message) not in {type(changed) for changed, _ in GOLDEN_2}:
        assert encode(message).hex() == frame


@pytest.mark.parametrize(("message", "frame"), GOLDEN_2, ids=lambda m: type(m).__name__)
def test_golden_of_version_2(message: Message, frame: str) -> None:
    assert encode(message).hex() == frame
    assert decoded(message, frame) == [message]


def test_a_grant_for_the_largest_cache_fits() -> None:
    encode(Grant(T, 1, 1, 1, "raw", [2**32 - 1] * MAX_PLACES))


def test_golden_data() -> None:
    piece = Piece(0, 1, 2, 3, 4, 6)
    checksum = data_checksum(T, 1, piece, "raw", b"abcdefgh")
    data = Data(T, 1, 0, 1, 2, 3, 4, 6, "raw", checksum)
    assert encode(data, 8).hex() == (
        "2900000008000000"
        "9b11c410000102030405060708090a0b0c0d0e0f01000102030406a3726177c408" + checksum.hex()
    )
    assert checksum.hex() == "11733bc0119ac920"
    assert data.piece == piece


def test_appended_fields_of_a_newer_peer_are_ignored() -> None:
    body = bytes.fromhex("930307a3") + b"new"
    assert feed(reader(), PREFIX.pack(len(body), 0) + body, [99]) == [Ping(7)]


def test_checksum_covers_place_and_bytes() -> None:
    piece = Piece(0, 0, 0, 1, 0, 1)
    seen = {
        data_checksum(T, 1, piece, "raw", b"x"),
        data_checksum(T, 1, piece, "raw", b"y"),
        data_checksum(D, 1, piece, "raw", b"x"),
        data_checksum(T, 2, piece, "raw", b"x"),
        data_checksum(T, 1, piece, "zip", b"x"),
        data_checksum(T, 1, Piece(0, 0, 0, 1, 1, 2), "raw", b"x"),
    }
    assert len(seen) == 6


@given(
    st.lists(st.one_of(st.integers(1, SLOT), st.none()), max_size=8),
    st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_cut_gives_the_same_messages(
    payloads: list[int | None], cuts: list[int], skip: bool
) -> None:
    stream, want, sinks = b"", [], []
    for n, size in enumerate(payloads):
        message = Ping(n) if size is None else Data(T, n, 0, 0, 0, 1, 0, 1, "raw", bytes(8))
        payload = bytes((n + at) % 251 for at in range(size or 0))
        stream += encode(message, len(payload)) + payload
        want.append(message)
        if size is not None:
            sinks.append((memoryview(bytearray(SLOT)), payload))
    order = iter(sinks)

    def sink(data: Data, nbytes: int) -> memoryview | None:
        target, payload = next(order)
        assert nbytes == len(payload)
        return None if skip else target

    assert feed(reader(sink=sink), stream, cuts) == want
    for target, payload in sinks:
        assert bytes(target[: len(payload)]) == (bytes(len(payload)) if skip else payload)


@given(st.binary(max_size=300), st.lists(st.integers(1, 64), min_size=1, max_size=4))
def test_garbage_raises_nothing_but_peer_errors(noise: bytes, cuts: list[int]) -> None:
    for decoder in (receiver_decoder, sender_decoder):
        with contextlib.suppress(PeerError):
            feed(reader(decoder), noise, cuts)


@given(
    st.sampled_from(
        [m for m, _ in GOLDEN_1 + GOLDEN_2 if not isinstance(m, Grant | Deny | Ack | Done)]
    ),
    st.integers(0, 2**16),
    st.integers(0, 7),
)
def test_flipped_bits_raise_nothing_but_peer_errors(message, at: int, bit: int) -> None:
    frame = bytearray(encode(message))
    frame[at % len(frame)] ^= 1 << bit
    with contextlib.suppress(PeerError):
        feed(reader(), bytes(frame) * 2, [13])


@pytest.mark.parametrize(
    "frame",
    [
        PREFIX.pack(MAX_HEADER_BYTES + 1, 0),
        PREFIX.pack(0, 0),
        PREFIX.pack(10, SLOT + 1),
        encode(Ping(1), 5),
        encode(Data(T, 1, 0, 0, 0, 1, 0, 1, "raw", bytes(8)), 0),
        encode(Data(T[:15], 1, 0, 0, 0, 1, 0, 1, "raw", bytes(8)), 1),
        encode(Commit(T, 1, [], D)),
        encode(Commit(T, 1, [-1], D)),
        encode(Abort(T, 1, "c" * 65, "m")),
        encode(Done(T, 1)),  # not for a decode node
    ],
)
def test_bounds(frame: bytes) -> None:
    with pytest.raises(PeerError, match=r".") as caught:
        feed(reader(), frame, [64])
    assert caught.value.code == "protocol_error"


def test_longest_commit_fits_and_longer_ones_do_not() -> None:
    ids = [2**32 - 1] * MAX_COMMIT_IDS
    commit = Commit(T, 2**32 - 1, ids, D)
    assert feed(reader(), encode(commit), [5000]) == [commit]
    with pytest.raises(ValueError, match="exceeds"):
        encode(Commit(T, 1, ids + ids, D))


def test_prompt_digest() -> None:
    ids = [0, 1, 2**32 - 1]
    packed = b"".join(i.to_bytes(4, "little") for i in ids)
    assert prompt_digest(ids) == hashlib.blake2b(packed, digest_size=16).digest()
    assert prompt_digest(range(3)) != prompt_digest([0, 1])
    with pytest.raises(OverflowError):
        prompt_digest([2**32])
