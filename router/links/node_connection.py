"""One connection to a node: bytes, frames, greeting, pings. ``node_link`` opens it again.

Messages are handed on by a plain call from the read callback; nothing here knows streams or views.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

from wire.errors import MeshError, PeerError
from wire.framing import FrameWriter, encode, router_side_reader
from wire.messages import Goodbye, Hello, NodeMessage, Ping, Pong, RouterMessage

MAX_WRITE_BACKLOG = 8 * 1024 * 1024
"""Bytes of small frames that a node may leave unread before the link is given up."""

MAX_BULK_BACKLOG = 64 * 1024 * 1024
"""The same for the parts of long messages that wait for room: six of the largest requests, a second
of a 500 Mbit/s link. More waits only where nothing moves."""

GOODBYE_S = 1.0
"""How long the word on why we leave is tried for. Guess: several round trips."""

MAX_EARLY_MESSAGES = 1024
"""Messages taken between the greeting and its check, a matter of one turn of the event loop."""

RTT_WEIGHT = 0.2
"""Weight of a new round trip in the average. Guess: follows a change within some ten pings."""


class NodeConnection(asyncio.Protocol):
    """One TCP (or TLS) connection: bytes, frames, greeting, pings. Ends in ``closed``."""

    def __init__(
        self,
        hello: Hello,
        dispatch: Callable[[NodeMessage], None],
        on_rtt: Callable[[float], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.greeted: asyncio.Future[Hello] = loop.create_future()
        self.closed: asyncio.Future[MeshError] = loop.create_future()
        self.version = 0  # agreed on after the greeting
        self.rtt_ms: float | None = None
        self.heard_at = loop.time()
        self._loop = loop
        self._dispatch = dispatch
        self._on_rtt = on_rtt
        self._hello = hello
        self._reader = router_side_reader()
        self._writer = FrameWriter()
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._early: list[NodeMessage] | None = []
        self._pings: dict[int, float] = {}
        self._nonce = 0
        self._said_goodbye = False

    # ---- transport callbacks ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._transport.write(encode(self._hello))

    def data_received(self, data: bytes) -> None:
        if self.closed.done():
            return
        self.heard_at = self._loop.time()
        try:
            for message in self._reader.feed(data):
                self._receive(message)
        except PeerError as exc:
            self.say_goodbye(exc)
            self._end(exc)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = "the node closed the link" if exc is None else f"the link broke: {exc}"
        self._end(PeerError(reason, code="link_lost"))

    # ---- sending ------------------------------------------------------------------------------

    def send(self, message: RouterMessage) -> None:
        """Write a frame, or queue the parts of a long message."""
        if self._transport is None or self._transport.is_closing():
            return
        frame = self._writer.push(message)
        if frame:
            self._transport.write(frame)
            stuck = self._transport.get_write_buffer_size() > MAX_WRITE_BACKLOG
        else:
            self._pump()
            stuck = self._writer.bulk_bytes > MAX_BULK_BACKLOG
        if stuck:
            self._end(PeerError("the node reads nothing any more", code="link_lost"))

    def _pump(self) -> None:
        """Parts of long messages, until the transport has enough (it calls ``pause_writing``)."""
        while not self._paused and self._transport is not None:
            frame = self._writer.next_bulk()
            if not frame:
                return
            self._transport.write(frame)

    def ping(self) -> None:
        """Send a probe; its answer updates ``rtt_ms``."""
        self._nonce += 1
        self._pings[self._nonce] = self._loop.time()
        self.send(Ping(self._nonce))

    def ssl_object(self) -> ssl.SSLObject:
        """The TLS session of a connection that has one."""
        assert self._transport is not None
        found: ssl.SSLObject = self._transport.get_extra_info("ssl_object")
        return found

    def say_goodbye(self, error: MeshError) -> None:
        """Tell the node why the link ends; ``abort`` then leaves a moment for these words."""
        self.send(Goodbye(error.code, error.message))
        self._said_goodbye = True

    def give_up(self, error: MeshError) -> None:
        """The connection is of no use any more; whoever watches ``closed`` aborts it."""
        self._end(error)

    def abort(self) -> None:
        """End now: a node that reads nothing keeps no socket and no buffer of ours."""
        transport, self._transport = self._transport, None
        if transport is not None and self._said_goodbye:
            transport.close()
            self._loop.call_later(GOODBYE_S, transport.abort)
        elif transport is not None:
            transport.abort()
        self._end(PeerError("the link was closed", code="link_lost"))

    # ---- receiving ----------------------------------------------------------------------------

    def deliver_early(self) -> None:
        """Pass on what came right after the greeting, before anybody listened."""
        early, self._early = self._early, None
        for message in early or ():
            self._dispatch(message)

    def _receive(self, message: NodeMessage) -> None:
        if not self.greeted.done():
            if isinstance(message, Hello):
                self.greeted.set_result(message)
                return
            if isinstance(message, Goodbye):
                raise PeerError(f"refused us: {message.message}", code=message.code)
            raise PeerError(f"{type(message).__name__} before Hello", code="protocol_error")
        match message:
            case Ping(nonce):
                self.send(Pong(nonce))
            case Pong(nonce):
                sent_at = self._pings.pop(nonce, None)
                if sent_at is not None:
                    self._measure((self._loop.time() - sent_at) * 1e3)
            case Goodbye(code, text):
                raise PeerError(f"said goodbye: {text}", code=code)
            case _ if self._early is not None:
                self._early.append(message)
                if len(self._early) > MAX_EARLY_MESSAGES:
                    raise PeerError("too much said before the link was up", code="protocol_error")
            case _:
                self._dispatch(message)

    def _measure(self, rtt_ms: float) -> None:
        held = self.rtt_ms
        self.rtt_ms = rtt_ms if held is None else held + RTT_WEIGHT * (rtt_ms - held)
        self._on_rtt(self.rtt_ms)

    def _end(self, error: MeshError) -> None:
        if not self.closed.done():
            self.closed.set_result(error)
        if not self.greeted.done():
            self.greeted.set_exception(error)
            self.greeted.exception()  # whoever waits gets it; nobody waiting is fine too
