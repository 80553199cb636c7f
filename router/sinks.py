"""Two ways to hand an answer to an HTTP client: event by event, or whole.

Both bridge from synchronous calls of an ``Exchange`` to the one task that serves the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from router.api.errors import error_body
from router.api.render import ClientFinish, StreamRenderer, Usage, error_event
from wire.errors import MeshError

MAX_CLIENT_BACKLOG = 1024 * 1024
"""Unread bytes of one client before it counts as gone: thousands of events."""


@dataclass(frozen=True, slots=True)
class Served:
    """Which nodes serve an answer."""

    prefill: str
    decode: str


class SseSink:
    """Events of a streamed answer, written to the client's transport as they come.

    ``begun`` resolves to where the answer is served, or to the error that stands in its place.
    Until ``attach``, events wait (only for the time that sending the headers takes). ``ended``
    resolves to the last bytes, which the caller sends together with the end of the body.
    """

    def __init__(self, renderer: StreamRenderer, on_stuck: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[Served | MeshError] = loop.create_future()
        self.ended: asyncio.Future[bytes] = loop.create_future()
        self._head, self._tail = renderer.head, renderer.tail
        self._renderer = renderer
        self._on_stuck = on_stuck
        self._waiting = renderer.opening()
        self._transport: asyncio.Transport | None = None
        self._chunked = False

    def attach(self, transport: asyncio.Transport, chunked: bool) -> None:
        """Headers are out: write what waits, and everything else at once."""
        self._transport, self._chunked = transport, chunked
        waiting, self._waiting = self._waiting, b""
        if waiting:
            self._write(waiting)

    def headers(self, prefill: str, decode: str) -> None:
        """The first token is here."""
        if not self.begun.done():
            self.begun.set_result(Served(prefill, decode))

    def text(self, escaped: bytes, upto: int) -> None:
        """Write one event."""
        event = self._head + escaped + self._tail
        if self._transport is None:
            self._waiting += event
        else:
            self._write(event)

    def finish(self, reason: ClientFinish, usage: Usage) -> None:
        """The closing events are left to the caller, see ``ended``."""
        self._end(self._renderer.closing(reason, usage))

    def error(self, error: MeshError) -> None:
        """An HTTP status if nothing was sent yet, else the one error event."""
        if not self.begun.done():
            self.begun.set_result(error)
        self._end(error_event(error_body(error)))

    def _end(self, last: bytes) -> None:
        if not self.ended.done():
            self.ended.set_result(last)

    def _write(self, data: bytes) -> None:
        transport = self._transport
        assert transport is not None
        if transport.is_closing():
            return
        if self._chunked:  # RFC 9112, section 7.1
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            transport.write(data)
        if transport.get_write_buffer_size() > MAX_CLIENT_BACKLOG:
            self._on_stuck()


@dataclass(frozen=True, slots=True)
class Whole:
    """A complete answer; ``escaped`` is JSON-escaped text."""

    served: Served
    escaped: bytes
    reason: ClientFinish
    usage: Usage


class WholeSink:
    """Collects an answer; ``ended`` resolves to it or to the error."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[Whole | MeshError] = asyncio.get_running_loop().create_future()
        self._served = Served("", "")
        self._pieces: list[bytes] = []

    def headers(self, prefill: str, decode: str) -> None:
        """Remember who serves."""
        self._served = Served(prefill, decode)

    def text(self, escaped: bytes, upto: int) -> None:
        """Keep the text."""
        self._pieces.append(escaped)

    def finish(self, reason: ClientFinish, usage: Usage) -> None:
        """Complete."""
        if not self.ended.done():
            self.ended.set_result(Whole(self._served, b"".join(self._pieces), reason, usage))

    def error(self, error: MeshError) -> None:
        """Failed."""
        if not self.ended.done():
            self.ended.set_result(error)
