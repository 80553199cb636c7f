"""Frames of the KV stream: what two nodes say, and how it is cut into bytes.

Sans-IO. A frame is a fixed prefix (u32 header length, u32 payload length, little-endian), a msgpack
header ``[tag, field, ...]`` and, for ``Data`` alone, that many raw payload bytes. Payload bytes are
received straight into the memory that the reader's ``destination`` names, so they are never copied.
Every bound is checked before memory is taken: peers are not trusted. What the messages mean for a
transfer is decided by ``sender`` and ``receiver``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Annotated, Generic, TypeVar

import msgspec
import xxhash
from msgspec import Meta

from pop_node.kv_stream.spec import Piece
from wire.errors import PeerError

MIN_VERSION = 1
MAX_VERSION = 2
"""Version 2 resumes transfers whose connection broke: ``Hello.link``, ``Open.resumed``,
``Grant.arrived``. With a peer of version 1 they fail."""

MAX_HEADER_BYTES = 64 * 1024
"""Largest header: a ``Commit`` with ``MAX_COMMIT_IDS`` ids. All others but a ``Grant`` that resumes
stay below 4 KiB."""

MAX_COMMIT_IDS = 12_000
"""Five bytes each in the worst case, so that a ``Commit`` fits ``MAX_HEADER_BYTES``."""

MAX_PLACES = 8192
"""Places (group, component, layer) of a cache: 40 KiB in a ``Grant``, and ten times the largest
models of today."""

CODEC_RAW = "raw"
"""Payload bytes as they lie in the cache, ``[layer, token, *component.shape]``."""

CODEC_PACKED = "packed-1"
"""The same bytes as one block of ``kernels.codec``, format 1, which is shorter than they are. Where
it is granted, each piece comes packed or raw as its sender likes; nodes that do not know it neither
offer nor grant it."""

PREFIX = struct.Struct("<II")
_PLACE = struct.Struct("<16sIIIIIII")
_SCRATCH_BYTES = 4096
"""Receive buffer between payloads: several control frames, or a header and the first bytes of its
payload, which are the only payload bytes that get copied (1.6 % of a 256 KiB slot)."""

TransferId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
U63 = Annotated[int, Meta(ge=0, le=0x7FFF_FFFF_FFFF_FFFF)]
Name = Annotated[str, Meta(max_length=256)]
Code = Annotated[str, Meta(max_length=64)]
Text = Annotated[str, Meta(max_length=512)]
"""At most 4 bytes a character, so a header with one stays below 4 KiB."""


class _Frame(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Shared struct options; tags are given by the subclasses."""


class Hello(_Frame, frozen=True, tag=1):
    """First frame of each side. ``slot_bytes`` is the largest payload this side can receive.

    ``link`` numbers the links that a dialling side made to this peer, from 1 on; connections of one
    link share it (version 2). An accepting side leaves it 0.
    """

    min_version: U32
    max_version: U32
    mesh: Name
    name: Name
    site: Name
    incarnation: Name
    slot_bytes: U32
    link: U32 = 0


class Goodbye(_Frame, frozen=True, tag=2):
    """Last frame before a side closes a connection on purpose (refused handshake, violation)."""

    code: Code
    message: Text


class Ping(_Frame, frozen=True, tag=3):
    """Round-trip probe and sign of life; answered at once by ``Pong`` with the same nonce."""

    nonce: U63


class Pong(_Frame, frozen=True, tag=4):
    nonce: U63


class Open(_Frame, frozen=True, tag=16):
    """P -> D: this transfer begins here. Everything but ``codecs`` must equal what D was told;
    ``codecs`` are those that P can send, raw always among them.

    Said again over a new link, it takes the transfer up where it was; ``resumed`` says that it was
    granted before, so that a D which does not know it need not wait to be told (version 2).
    """

    transfer: TransferId
    attempt: U32
    model: Name
    identity: Name
    spec_digest: Digest
    prompt_tokens: U32
    prompt_digest: Digest
    codecs: Annotated[list[Code], Meta(max_length=8)]
    resumed: bool = False


class Data(_Frame, frozen=True, tag=17):
    """P -> D: one piece; its payload follows. ``checksum`` is ``data_checksum`` of both, over the
    payload as it travels."""

    transfer: TransferId
    attempt: U32
    group: U32
    component: U32
    layer_lo: U32
    layer_hi: U32
    token_lo: U32
    token_hi: U32
    codec: Code
    checksum: Annotated[bytes, Meta(min_length=8, max_length=8)]

    @property
    def piece(self) -> Piece:
        """The box of the cache that the payload fills; not yet checked against any spec."""
        return Piece(
            self.group,
            self.component,
            self.layer_lo,
            self.layer_hi,
            self.token_lo,
            self.token_hi,
        )


class Commit(_Frame, frozen=True, tag=18):
    """P -> D: all pieces are on their way; go on after output tokens ``ids``."""

    transfer: TransferId
    attempt: U32
    ids: Annotated[list[U32], Meta(min_length=1, max_length=MAX_COMMIT_IDS)]
    prompt_digest: Digest


class Grant(_Frame, frozen=True, tag=32):
    """D -> P: blocks are allocated, tokens [0, have_tokens) are here already, send the rest.

    One ``Data`` frame uses ``Hello.slot_bytes`` of credit, however short its payload: credit is
    staging slots times their size, so a frame within its credit always finds a slot. Credit and
    ``Ack.received_bytes`` count from this ``Grant`` on. ``codec`` is what payloads may come in,
    besides raw.

    ``arrived``, when the transfer was granted before: per group, component and layer of the
    ``KvSpec``, in this order, how many tokens at the beginning are here (version 2).
    """

    transfer: TransferId
    attempt: U32
    credit_bytes: U63
    have_tokens: U32
    codec: Code
    arrived: Annotated[list[U32], Meta(max_length=MAX_PLACES)] = []


class Deny(_Frame, frozen=True, tag=33):
    """D -> P: no ``Grant`` will come."""

    transfer: TransferId
    attempt: U32
    code: Code
    message: Text
    retryable: bool


class Ack(_Frame, frozen=True, tag=34):
    """D -> P: ``received_bytes`` bytes of KV in all have arrived, parts of pieces counted, packed
    ones by their share of the piece; more credit, or none."""

    transfer: TransferId
    attempt: U32
    credit_bytes_returned: U63
    received_bytes: U63


class Done(_Frame, frozen=True, tag=35):
    """D -> P: committed; D decodes on."""

    transfer: TransferId
    attempt: U32


class Abort(_Frame, frozen=True, tag=48):
    """Either way: the transfer is over for the side that says so."""

    transfer: TransferId
    attempt: U32
    code: Code
    message: Text


LinkMessage = Hello | Goodbye | Ping | Pong
ToReceiver = Open | Data | Commit | Abort
ToSender = Grant | Deny | Ack | Done | Abort
FromSender = LinkMessage | ToReceiver
FromReceiver = LinkMessage | ToSender
Message = FromSender | FromReceiver

M = TypeVar("M", bound=Message)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message, payload_bytes: int = 0) -> bytes:
    """Prefix and header of one frame; the caller sends ``payload_bytes`` payload bytes after it.

    Raises ``ValueError`` when the header exceeds ``MAX_HEADER_BYTES``.
    """
    header = _encoder.encode(message)
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"frame header of {len(header)} bytes exceeds {MAX_HEADER_BYTES}")
    return PREFIX.pack(len(header), payload_bytes) + header


def data_checksum(
    transfer: bytes, attempt: int, piece: Piece, codec: str, payload: memoryview | bytes
) -> bytes:
    """XXH3-64 of the payload, seeded with the XXH3-64 of its place; 8 bytes big-endian.

    The seed makes bytes that arrive under a wrong transfer, attempt or position fail the check too.
    """
    place = _PLACE.pack(
        transfer,
        attempt,
        piece.group,
        piece.component,
        piece.layer_lo,
        piece.layer_hi,
        piece.token_lo,
        piece.token_hi,
    )
    seed = xxhash.xxh3_64_intdigest(place + codec.encode())
    return xxhash.xxh3_64_digest(payload, seed=seed)


class FrameReader(Generic[M]):
    """Turns received bytes into messages of one direction.

    Write received bytes into ``get_buffer()``, then iterate ``received(n)`` to its end: a message
    is parsed only after the one before it was taken, so the caller's state is up to date when
    ``destination(data, payload_bytes)`` is asked where a payload belongs. It answers with a view of
    at least that size, or with None to have the payload skipped. A ``Data`` message is yielded when
    its payload is complete. Any violation raises ``PeerError`` (``protocol_error``); the reader is
    unusable afterwards and the connection must close.
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[M],
        max_payload_bytes: int,
        destination: Callable[[Data, int], memoryview | None],
    ) -> None:
        self._decoder = decoder
        self._max_payload_bytes = max_payload_bytes
        self._destination = destination
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._head = bytearray()  # prefix and header of the frame under way
        self._message: M | None = None  # a Data whose payload is under way
        self._target: memoryview | None = None
        self._filled = 0
        self._payload_bytes = 0
        self._lent_target = False

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        self._lent_target = self._target is not None
        if self._target is not None:
            return self._target[self._filled :]
        return self._scratch

    def received(self, count: int) -> Iterator[M]:
        """Messages completed by ``count`` bytes written into the last ``get_buffer()``."""
        if self._lent_target:
            self._filled += count
            yield from self._finish_payload()
            return
        at = 0
        while at < count:
            if self._message is not None:
                at += self._take_payload(self._scratch[at:count])
            else:
                at += self._take_head(self._scratch[at:count])
                message = self._parse_head()
                if message is not None:
                    yield message
            yield from self._finish_payload()

    @property
    def payload_filled(self) -> int:
        """Bytes of the payload under way that have arrived; 0 between payloads."""
        return self._filled if self._message is not None else 0

    def drop_target(self) -> None:
        """Let go of the payload memory; the connection is closed."""
        self._target = None

    def _take_head(self, chunk: memoryview) -> int:
        want = PREFIX.size
        if len(self._head) >= want:
            want += PREFIX.unpack_from(self._head)[0]
        taken = min(want - len(self._head), len(chunk))
        self._head += chunk[:taken]
        return taken

    def _parse_head(self) -> M | None:
        if len(self._head) < PREFIX.size:
            return None
        header_bytes, payload_bytes = PREFIX.unpack_from(self._head)
        if not 0 < header_bytes <= MAX_HEADER_BYTES:
            raise _violation(f"header of {header_bytes} bytes; 1 to {MAX_HEADER_BYTES} are allowed")
        if payload_bytes > self._max_payload_bytes:
            raise _violation(f"payload of {payload_bytes} bytes exceeds {self._max_payload_bytes}")
        if len(self._head) < PREFIX.size + header_bytes:
            return None
        message = self._decode(bytes(self._head[PREFIX.size :]))
        self._head.clear()
        if isinstance(message, Data) != (payload_bytes > 0):
            raise _violation(f"{type(message).__name__} with a payload of {payload_bytes} bytes")
        if not isinstance(message, Data):
            return message
        self._message = message
        self._filled, self._payload_bytes = 0, payload_bytes
        target = self._destination(message, payload_bytes)
        self._target = None if target is None else target[:payload_bytes]
        return None

    def _take_payload(self, chunk: memoryview) -> int:
        taken = min(self._payload_bytes - self._filled, len(chunk))
        if self._target is not None:
            self._target[self._filled : self._filled + taken] = chunk[:taken]
        self._filled += taken
        return taken

    def _finish_payload(self) -> Iterator[M]:
        if self._message is not None and self._filled == self._payload_bytes:
            message, self._message, self._target = self._message, None, None
            yield message

    def _decode(self, header: bytes) -> M:
        try:
            return self._decoder.decode(header)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise _violation(f"undecodable frame: {exc}") from exc


def sender_decoder() -> msgspec.msgpack.Decoder[FromReceiver]:
    """Decodes what a prefill node hears."""
    return msgspec.msgpack.Decoder(FromReceiver)


def receiver_decoder() -> msgspec.msgpack.Decoder[FromSender]:
    """Decodes what a decode node hears."""
    return msgspec.msgpack.Decoder(FromSender)


def _violation(message: str) -> PeerError:
    return PeerError(message, code="protocol_error", retryable=True)
