"""Frames of the mesh wire: ``u32 little-endian length`` then one msgpack message.

Sans-IO: bytes in, messages out, and the reverse. A frame holds at most 64 KiB; a larger message is
cut into ``Part`` frames that other messages may overtake, so that a long prompt never holds up a
``Step`` or a ``Cancel``. Every bound is checked before memory is taken: peers are not trusted.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from wire.errors import PeerError
from wire.messages import Message, NodeMessage, Part, RouterMessage

MAX_FRAME_BYTES = 64 * 1024
"""Largest frame body. Guess: 5 ms of a 100 Mbit/s link, the longest that a ``Step`` should wait."""

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Largest reassembled message: a 10 MB request body (the HTTP limit) plus its envelope."""

MAX_OPEN_PARTS = 64
"""Messages under reassembly at once on one link; beyond it the peer is misbehaving."""

MAX_REASSEMBLY_BYTES = 64 * 1024 * 1024
"""Bytes of all messages under reassembly at once on one link."""

_LENGTH = struct.Struct("<I")
_PART_OVERHEAD = 64  # tag, ids and msgpack headers of a Part, rounded up
_encoder = msgspec.msgpack.Encoder()

M = TypeVar("M")


def encode(message: Message) -> bytes:
    """One frame for a message that fits one; raises ``ValueError`` when it does not."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"message of {len(body)} bytes does not fit one frame; use FrameWriter")
    return _LENGTH.pack(len(body)) + body


class FrameWriter:
    """Orders outgoing messages: small ones at once, large ones in parts whenever there is room."""

    def __init__(self) -> None:
        self._next_message = 0
        self._bulk: deque[Iterator[bytes]] = deque()
        self.bulk_bytes = 0  # of large messages that wait for room

    def push(self, message: Message) -> bytes:
        """Return the frame to write now; empty when the message went to the bulk queue.

        Raises ``ValueError`` when the message exceeds ``MAX_MESSAGE_BYTES``.
        """
        body = _encoder.encode(message)
        if len(body) <= MAX_FRAME_BYTES:
            return _LENGTH.pack(len(body)) + body
        if len(body) > MAX_MESSAGE_BYTES:
            raise ValueError(f"message of {len(body)} bytes exceeds {MAX_MESSAGE_BYTES}")
        self._bulk.append(self._parts(self._next_message, body))
        self._next_message += 1
        self.bulk_bytes += len(body)
        return b""

    def next_bulk(self) -> bytes:
        """One ``Part`` frame of the oldest large message; empty when none is pending."""
        while self._bulk:
            frame = next(self._bulk[0], None)
            if frame is not None:
                return frame
            self._bulk.popleft()
        return b""

    def _parts(self, number: int, body: bytes) -> Iterator[bytes]:
        size = MAX_FRAME_BYTES - _PART_OVERHEAD
        for at in range(0, len(body), size):
            last = at + size >= len(body)
            data = body[at : at + size]
            self.bulk_bytes -= len(data)
            yield encode(Part(number, last, data))


class FrameReader(Generic[M]):
    """Turns received bytes into messages of one direction.

    Any violation (oversized frame, undecodable body, too many parts) raises ``PeerError`` with code
    ``protocol_error``; the reader is unusable afterwards and the link must close.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self._decoder = decoder
        self._rest = b""
        self._parts: dict[int, bytearray] = {}
        self._part_bytes = 0

    def feed(self, data: bytes) -> list[M]:
        """Messages completed by ``data``, in order of completion."""
        buffer = self._rest + data if self._rest else data
        messages: list[M] = []
        at, end = 0, len(buffer)
        view = memoryview(buffer)
        while end - at >= 4:
            length = _LENGTH.unpack_from(buffer, at)[0]
            if length > MAX_FRAME_BYTES:
                raise _violation(f"frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
            if end - at - 4 < length:
                break
            message = self._decode(view[at + 4 : at + 4 + length])
            at += 4 + length
            if isinstance(message, Part):
                whole = self._collect(message)
                if whole is None:
                    continue
                message = self._decode(memoryview(whole))
                if isinstance(message, Part):
                    raise _violation("a Part inside a Part")
            messages.append(message)
        self._rest = bytes(view[at:]) if at < end else b""
        return messages

    def _decode(self, body: memoryview) -> M:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise _violation(f"undecodable frame: {exc}") from exc

    def _collect(self, part: Part) -> bytearray | None:
        held = self._parts.get(part.message)
        if held is None:
            if len(self._parts) >= MAX_OPEN_PARTS:
                raise _violation(f"more than {MAX_OPEN_PARTS} messages in parts")
            held = self._parts[part.message] = bytearray()
        held += part.data
        self._part_bytes += len(part.data)
        if len(held) > MAX_MESSAGE_BYTES or self._part_bytes > MAX_REASSEMBLY_BYTES:
            raise _violation("messages in parts exceed their bound")
        if not part.last:
            return None
        del self._parts[part.message]
        self._part_bytes -= len(held)
        return held


def router_side_reader() -> FrameReader[NodeMessage]:
    """Reader for what nodes say."""
    return FrameReader(msgspec.msgpack.Decoder(NodeMessage))


def node_side_reader() -> FrameReader[RouterMessage]:
    """Reader for what routers say."""
    return FrameReader(msgspec.msgpack.Decoder(RouterMessage))


def negotiate(mine_min: int, mine_max: int, theirs_min: int, theirs_max: int) -> int:
    """Highest version both sides speak; raises ``PeerError`` (``version_mismatch``) if none."""
    version = min(mine_max, theirs_max)
    if version < max(mine_min, theirs_min):
        raise PeerError(
            f"no common mesh wire version: we speak {mine_min}-{mine_max}, "
            f"the peer {theirs_min}-{theirs_max}; upgrade the older side",
            code="version_mismatch",
            retryable=False,
        )
    return version


def _violation(message: str) -> PeerError:
    return PeerError(message, code="protocol_error", retryable=True)
