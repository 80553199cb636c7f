"""One TCP connection of the KV stream: handshake, frames in and out, keepalive.

A thin protocol for asyncio or uvloop. It owns the socket and the order of what is written; what
messages mean is its owner's business. Payload bytes are received straight into staging slots, and
written from them without a copy: a slot is reported written only when the transport's buffer is
empty again. That buffer holds one frame at most, so small control frames overtake queued pieces.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

import msgspec

from pop_node.kv_stream.faults import as_text, reported, violation
from pop_node.kv_stream.frames import (
    MAX_VERSION,
    MIN_VERSION,
    Data,
    FrameReader,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    encode,
)
from pop_node.kv_stream.liveness import Keepalive
from wire.errors import MeshError, PeerError
from wire.framing import negotiate

MAX_CONTROL_FRAMES = 4096
"""Unwritten control frames of one connection: two acknowledgements for each slot of the staging
memory, many times over. A peer that reads so little is as good as gone."""

CLOSE_WAIT_S = 1.0
"""For the last frame and the TLS closure of a connection that we end; guess."""

UNSENT_BYTES = 256 * 1024
"""Bytes that the kernel takes beyond what is on its way (TCP_NOTSENT_LOWAT): one slot keeps the
link busy while we wake up, and a control frame never queues behind more. Guess."""


LINK_VERSION = 2
"""First version of the KV stream that numbers links."""


@dataclass(frozen=True, slots=True)
class PieceFrame:
    """A data frame ready to be written: its head and the staging slot with its payload."""

    head: bytes
    payload: memoryview
    slot: int


M = TypeVar("M", bound=Message)


class Owner(Protocol[M]):
    """What a connection tells the side of the stream that it belongs to."""

    def on_made(self, conn: Connection[M]) -> None:
        """The connection is there; ``on_lost`` will follow in the end."""

    def admit(self, conn: Connection[M], hello: Hello) -> None:
        """The peer said who it is; raise ``MeshError`` to refuse it."""

    def on_message(self, conn: Connection[M], message: M) -> None:
        """A message other than those of the connection itself; for ``Data`` the payload is in."""

    def destination(self, conn: Connection[M], data: Data, nbytes: int) -> memoryview | None:
        """Where this payload goes; None to skip it."""

    def on_rtt(self, conn: Connection[M], rtt_s: float) -> None:
        """A round trip was measured; ``rtt_s`` is the smallest recent one."""

    def next_piece(self, conn: Connection[M]) -> PieceFrame | None:
        """The next data frame to write here, if any."""

    def on_written(self, conn: Connection[M], slot: int) -> None:
        """The slot of a ``next_piece`` is not read any more."""

    def on_blocked(self, conn: Connection[M]) -> None:
        """The transport took less than what was written: the link sets the pace."""

    def on_lost(self, conn: Connection[M], error: MeshError) -> None:
        """The connection is gone; said once, after every ``on_written``."""


class Connection(asyncio.BufferedProtocol, Generic[M]):
    """See the module's docstring. ``number`` is unique within the endpoint; ``version`` is the one
    spoken, 0 before the peer's ``Hello``; ``is_silent`` says that it was given up for that."""

    def __init__(
        self,
        number: int,
        owner: Owner[M],
        hello: Hello,
        decoder: msgspec.msgpack.Decoder[M],
    ) -> None:
        self.number = number
        self.peer: Hello | None = None
        self.version = 0
        self.is_silent = False
        self.keepalive = Keepalive(time.monotonic())
        self._owner = owner
        self._hello = hello
        self._reader = FrameReader(decoder, hello.slot_bytes, self._destination)
        self._transport: asyncio.Transport | None = None
        self._control: deque[bytes] = deque()
        self._unwritten: list[int] = []  # slots of frames in the transport's buffer
        self._paused = False
        self._flushing = False
        self._error: MeshError | None = None
        self._gone = False
        self._cut_off: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()

    @property
    def ssl_object(self) -> ssl.SSLObject | None:
        """The TLS session, None on a plain connection."""
        if self._transport is None:
            return None
        found: ssl.SSLObject | None = self._transport.get_extra_info("ssl_object")
        return found

    @property
    def link(self) -> int:
        """The number of the peer's link; 0 when it numbers none."""
        return self.peer.link if self.peer is not None and self.version >= LINK_VERSION else 0

    @property
    def payload_filled(self) -> int:
        """Bytes of the payload under way that have arrived."""
        return self._reader.payload_filled

    def is_closing(self) -> bool:
        """True once the connection is ending or gone."""
        return self._gone or self._error is not None

    def send(self, message: Message) -> None:
        """Queue a control frame; dropped when the connection is closing."""
        if self.is_closing():
            return
        if len(self._control) >= MAX_CONTROL_FRAMES:
            self.fail(PeerError("the peer does not read", code="link_lost"))
            return
        self._control.append(encode(message))
        self.flush()

    def flush(self) -> None:
        """Write what is queued, control frames first, until the transport is full."""
        if self._flushing or self._transport is None:
            return
        self._flushing = True
        try:
            while not self._paused and not self.is_closing():
                if self._control:
                    self._transport.write(self._control.popleft())
                elif self.peer is None or (piece := self._owner.next_piece(self)) is None:
                    break
                else:
                    self._unwritten.append(piece.slot)
                    self._transport.write(piece.head)
                    self._transport.write(piece.payload)
                self._report_written()
        finally:
            self._flushing = False

    def tick(self, now: float) -> None:
        """Ping when it is time; give up on a peer that has gone silent."""
        if self.is_closing():
            return
        if self.keepalive.is_dead(now):
            self.is_silent = True
            self.fail(PeerError(f"{self._name()} has gone silent", code="link_lost"))
        elif self.peer is not None and (ping := self.keepalive.due(now)) is not None:
            self.send(ping)

    def fail(self, error: MeshError) -> None:
        """Close on purpose, telling the peer why if it still reads."""
        if self.is_closing():
            return
        self._error = error
        if self._transport is None:
            return
        self._transport.write(encode(Goodbye(*as_text(error))))
        self._transport.close()
        loop = asyncio.get_running_loop()
        self._cut_off = loop.call_later(CLOSE_WAIT_S, self._transport.abort)

    async def wait_closed(self) -> None:
        """Wait for the end of a closing connection, which comes within ``CLOSE_WAIT_S``."""
        await self._closed.wait()

    # ---- asyncio -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        # "Full" means anything at all left over. TLS transports compare with >=, plain ones with >.
        transport.set_write_buffer_limits(high=0 if self.ssl_object is None else 1, low=0)
        self._owner.on_made(self)
        self.send(self._hello)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self.is_closing():  # a TLS transport reads on while it closes
            return
        now = time.monotonic()
        self.keepalive.heard(now)
        try:
            for message in self._reader.received(nbytes):
                self._take(message, now)
                if self.is_closing():
                    return
        except MeshError as error:
            self.fail(error)

    def eof_received(self) -> bool:
        return False  # close: a stream that cannot acknowledge is of no use

    def pause_writing(self) -> None:
        self._paused = True
        self._owner.on_blocked(self)

    def resume_writing(self) -> None:
        self._paused = False
        self._report_written()
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        if self._cut_off is not None:
            self._cut_off.cancel()
        self._reader.drop_target()
        self._control.clear()
        self._closed.set()
        written, self._unwritten = self._unwritten, []
        for slot in written:
            self._owner.on_written(self, slot)
        error = self._error
        if error is None:
            why = f": {exc}" if exc is not None else ""
            error = PeerError(f"connection to {self._name()} lost{why}", code="link_lost")
        self._owner.on_lost(self, error)

    # ---- inside --------------------------------------------------------------------------------

    def _destination(self, data: Data, nbytes: int) -> memoryview | None:
        if self.peer is None:
            raise violation("Data before Hello")
        return self._owner.destination(self, data, nbytes)

    def _take(self, message: M, now: float) -> None:
        if isinstance(message, Goodbye):
            self._error = reported(message.code, message.message)
            if self._transport is not None:
                self._transport.abort()
        elif isinstance(message, Hello):
            self._meet(message)
            self.keepalive.begin(now)
            self.tick(now)
        elif self.peer is None:
            raise violation(f"{type(message).__name__} before Hello")
        elif isinstance(message, Ping):
            self.send(Pong(message.nonce))
        elif isinstance(message, Pong):
            if self.keepalive.pong(message.nonce, now):
                self._owner.on_rtt(self, self.keepalive.rtt_s)
        else:
            self._owner.on_message(self, message)

    def _meet(self, hello: Hello) -> None:
        if self.peer is not None:
            raise violation("a second Hello")
        self.version = negotiate(MIN_VERSION, MAX_VERSION, hello.min_version, hello.max_version)
        if hello.mesh != self._hello.mesh:
            raise PeerError(
                f"{hello.name} belongs to mesh {hello.mesh!r}, not {self._hello.mesh!r}",
                code="identity_mismatch",
                retryable=False,
            )
        if hello.slot_bytes == 0:
            raise violation("a Hello without slots")
        self.peer = hello
        try:
            self._owner.admit(self, hello)
        except MeshError:
            self.peer = None
            raise

    def _report_written(self) -> None:
        if self._unwritten and self._transport is not None:
            if self._transport.get_write_buffer_size():
                return
            written, self._unwritten = self._unwritten, []
            for slot in written:
                self._owner.on_written(self, slot)

    def _name(self) -> str:
        return self.peer.name if self.peer is not None else "an unknown peer"
