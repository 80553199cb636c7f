"""Framing: any cut of the byte stream gives the same messages, and no peer can make us swell."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.wire_samples import NODE_SAYS, ROUTER_SAYS, submit
from wire import framing
from wire.errors import MeshError, PeerError
from wire.framing import (
    MAX_FRAME_BYTES,
    FrameReader,
    FrameWriter,
    encode,
    negotiate,
    node_side_reader,
    router_side_reader,
)
from wire.messages import Cancel, Part, Ping, Step, StepEntry, TextInput

NODE_MESSAGES = st.sampled_from(list(NODE_SAYS.values()))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def feed_untrusted(reader: FrameReader, data: bytes) -> tuple[list, str | None]:
    """(messages, code of the refusal or None)."""
    try:
        return reader.feed(data), None
    except PeerError as exc:
        return [], exc.code


@given(st.lists(NODE_MESSAGES, max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cut_of_the_stream_gives_the_same_messages(messages, places):
    reader = router_side_reader()
    data = b"".join(encode(message) for message in messages)
    received = [message for piece in cut(data, places) for message in reader.feed(piece)]
    assert received == messages


@given(st.binary(max_size=300))
def test_noise_is_refused_or_waited_for_but_never_crashes(data):
    for reader in (router_side_reader(), node_side_reader()):
        assert feed_untrusted(reader, data)[1] in (None, "protocol_error")


@given(st.sampled_from(list(ROUTER_SAYS.values())), st.data())
def test_a_damaged_frame_is_refused_or_still_well_formed(message, data):
    frame = bytearray(encode(message))
    at = data.draw(st.integers(4, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    received, refusal = feed_untrusted(node_side_reader(), bytes(frame))
    assert refusal in (None, "protocol_error")
    assert all(isinstance(message, msgspec.Struct) for message in received)


@given(st.integers(MAX_FRAME_BYTES + 1, 2**32 - 1))
def test_an_oversized_frame_is_refused_by_its_header_alone(length):
    with pytest.raises(PeerError, match="exceeds"):
        router_side_reader().feed(length.to_bytes(4, "little"))


def test_a_message_of_the_other_direction_is_refused():
    with pytest.raises(PeerError):
        router_side_reader().feed(encode(Cancel(1)))
    with pytest.raises(PeerError):
        node_side_reader().feed(encode(Step([])))


def test_a_large_message_travels_in_parts_that_others_overtake():
    writer, reader = FrameWriter(), node_side_reader()
    large = submit(TextInput("x" * 300_000))
    assert writer.push(large) == b""
    received = reader.feed(writer.next_bulk())
    received += reader.feed(writer.push(Ping(1)))
    frames = 1
    while frame := writer.next_bulk():
        assert len(frame) <= 4 + MAX_FRAME_BYTES
        received += reader.feed(frame)
        frames += 1
    assert received == [Ping(1), large]
    assert frames == 5


def test_two_large_messages_arrive_in_order_whatever_is_between():
    writer, reader = FrameWriter(), node_side_reader()
    first, second = submit(TextInput("a" * 70_000)), submit(TextInput("b" * 140_000))
    writer.push(first)
    writer.push(second)
    received = []
    while frame := writer.next_bulk():
        received += reader.feed(frame)
    assert received == [first, second]


def test_a_message_beyond_every_bound_is_refused_before_it_is_sent():
    with pytest.raises(ValueError, match="exceeds"):
        FrameWriter().push(submit(TextInput("x" * (framing.MAX_MESSAGE_BYTES + 1))))
    with pytest.raises(ValueError, match="FrameWriter"):
        encode(Step([StepEntry(1, 0, [], b"x" * MAX_FRAME_BYTES)]))


def test_too_many_messages_in_parts_are_refused():
    reader = node_side_reader()
    for number in range(framing.MAX_OPEN_PARTS):
        reader.feed(encode(Part(number, False, b"")))
    with pytest.raises(PeerError, match="in parts"):
        reader.feed(encode(Part(framing.MAX_OPEN_PARTS, False, b"")))


@pytest.mark.parametrize("bound", ["MAX_MESSAGE_BYTES", "MAX_REASSEMBLY_BYTES"])
def test_parts_cannot_grow_beyond_their_bound(monkeypatch, bound):
    monkeypatch.setattr(framing, bound, 1000)
    reader = node_side_reader()
    reader.feed(encode(Part(1, False, b"x" * 600)))
    with pytest.raises(PeerError, match="bound"):
        reader.feed(encode(Part(1 if bound == "MAX_MESSAGE_BYTES" else 2, False, b"x" * 600)))


def test_a_finished_message_frees_its_share_of_the_bound(monkeypatch):
    monkeypatch.setattr(framing, "MAX_REASSEMBLY_BYTES", 1000)
    reader = node_side_reader()
    body = msgspec.msgpack.encode(Ping(5))
    for number in range(300):
        (message,) = reader.feed(encode(Part(number, True, body)))
        assert message == Ping(5)


def test_a_part_inside_a_part_is_refused():
    inner = msgspec.msgpack.encode(Part(1, True, b""))
    with pytest.raises(PeerError, match="inside"):
        node_side_reader().feed(encode(Part(2, True, inner)))


@given(*(st.integers(1, 20) for _ in range(4)))
def test_versions_meet_at_the_highest_common_one_or_say_so(a, b, c, d):
    mine, theirs = sorted((a, b)), sorted((c, d))
    common = set(range(mine[0], mine[1] + 1)) & set(range(theirs[0], theirs[1] + 1))
    if common:
        assert negotiate(*mine, *theirs) == max(common)
    else:
        with pytest.raises(MeshError) as caught:
            negotiate(*mine, *theirs)
        assert caught.value.code == "version_mismatch"
        assert not caught.value.retryable
