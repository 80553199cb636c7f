"""Two ways to hand an answer to an HTTP client: event by event, or whole.

Both bridge from synchronous calls of an ``Exchange`` to the one task that serves the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

from router.api.errors import error_body
from router.api.event_id import TextProof, place_of
from router.api.render import ClientFinish, StreamRenderer, Usage, error_event
from router.request.resume_book import Ended, Resumable, Served
from wire.errors import MeshError, PeerError

MAX_CLIENT_BACKLOG = 1024 * 1024
"""Unread bytes of one client before it counts as gone: thousands of events."""


TAKEN_OVER = PeerError(
    "another connection goes on with this answer", code="taken_over", retryable=False
)


class SseSink:
    """Events of a streamed answer, written to the client's transport as they come, and noted down
    for a client that loses its connection.

    ``begun`` resolves to where the answer is served, or to the error that stands in its place.
    Until ``attach``, events wait (only for the time that sending the headers and, when an answer is
    resumed, the text so far takes). ``ended`` resolves to the last bytes, which the caller sends
    together with the end of the body.
    """

    def __init__(
        self,
        renderer: StreamRenderer,
        answer: Resumable,
        on_stuck: Callable[[], None],
        proof: TextProof | None,
        opening: bytes = b"",
    ) -> None:
        """``proof`` is of the text that the client has, None where none is known; ``opening`` goes
        before everything else."""
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[Served | MeshError] = loop.create_future()
        self.ended: asyncio.Future[bytes] = loop.create_future()
        self._id, self._head, self._tail = renderer.id, renderer.head, renderer.tail
        self._renderer = renderer
        self._answer = answer
        self._keep = answer.add
        self._is_proven = proof is not None
        sent = proof or TextProof()
        self._num_bytes, self._crc = sent.num_bytes, sent.crc
        self._on_stuck = on_stuck
        self._waiting = bytearray(opening)
        self._transport: asyncio.Transport | None = None
        self._chunked = False

    def attach(self, transport: asyncio.Transport, chunked: bool) -> None:
        """Headers are out: write what waits, and everything else at once."""
        self._transport, self._chunked = transport, chunked
        waiting, self._waiting = bytes(self._waiting), bytearray()
        if waiting and not transport.is_closing():
            if chunked:  # RFC 9112, section 7.1
                waiting = b"%x\r\n%b\r\n" % (len(waiting), waiting)
            transport.write(waiting)

    def headers(self, prefill: str, decode: str) -> None:
        """The first token is here."""
        if not self.begun.done():
            self.begun.set_result(Served(prefill, decode))

    def replayed(self, escaped: bytes, upto: int) -> bytes:
        """An event of the text that was sent before, for the caller to write first."""
        return self._event(escaped, upto)

    def text(self, escaped: bytes, upto: int) -> None:
        """Write one event."""
        self._keep(escaped, upto)
        event = self._event(escaped, upto)
        transport = self._transport
        if transport is None:
            self._waiting += event
            if len(self._waiting) > MAX_CLIENT_BACKLOG:
                self._on_stuck()
            return
        if transport.is_closing():
            return
        transport.write(b"%x\r\n%b\r\n" % (len(event), event) if self._chunked else event)
        if transport.get_write_buffer_size() > MAX_CLIENT_BACKLOG:
            self._on_stuck()

    def finish(self, reason: ClientFinish, usage: Usage) -> None:
        """The closing events are left to the caller, see ``ended``."""
        self._answer.ended = Ended(reason, usage)
        proof = TextProof(self._num_bytes, self._crc) if self._is_proven else None
        self._end(self._renderer.closing(reason, usage, proof))

    def error(self, error: MeshError) -> None:
        """An HTTP status if nothing was sent yet, else the one error event."""
        if not self.begun.done():
            self.begun.set_result(error)
        self._end(error_event(error_body(error)))

    def taken_over(self) -> None:
        """Another connection goes on with this answer; one that does not read is cut."""
        self.error(TAKEN_OVER)
        if self._transport is not None and self._transport.get_write_buffer_size():
            self._on_stuck()

    def _event(self, escaped: bytes, upto: int) -> bytes:
        """An event with this text, which counts as sent from now on.

        One formatting makes all of it, the id as in ``place_of``: the way of every token.
        """
        if not self._is_proven:
            return self._renderer.text(escaped, place_of(upto, None))
        self._num_bytes = num_bytes = self._num_bytes + len(escaped)
        self._crc = crc = crc32(escaped, self._crc)
        parts = (self._id, upto, num_bytes, crc, self._head, escaped, self._tail)
        return b"%b%d~%d.%08x%b%b%b" % parts

    def _end(self, last: bytes) -> None:
        if not self.ended.done():
            self.ended.set_result(last)


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
