"""The node's end of the mesh wire: one connection per router.

A thin shell around ``wire.framing``: greets, answers pings, hands submits and cancels to the agent
and writes what the agent says, in order. Large messages give way to small ones. It decides nothing
about requests.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Protocol, cast

from wire.errors import PeerError
from wire.framing import FrameWriter, encode, negotiate, node_side_reader
from wire.messages import (
    MAX_VERSION,
    MIN_VERSION,
    Attach,
    Cancel,
    Drill,
    Goodbye,
    Hello,
    NodeMessage,
    Ping,
    Pong,
    Retarget,
    RouterMessage,
    Step,
    StepEntry,
    Submit,
    Warm,
)

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
"""A peer that connects and stays silent is not a router. Guess: 10 RTTs around the Earth."""

SILENCE_S = 15.0
"""A router pings once a second; one that is silent for this long is gone, and its requests are
cancelled. Guess: rides out a stalled process or a few lost segments."""

STALL_S = 15.0
"""A router that takes nothing of a full buffer for this long does not read any more. Guess."""

WATCH_PERIOD_S = 5.0

CLOSE_WAIT_S = 1.0
"""For the last words to a router that we turn away; guess."""

MAX_WRITE_BUFFER_BYTES = 8 * 1024 * 1024
"""A router that reads so slowly that this much waits for it is cut; its requests are cancelled."""

STEP_BYTES = 48 * 1024
"""Entries beyond this go into another ``Step`` frame (a frame holds 64 KiB)."""


class Agent(Protocol):
    """What a link needs of the agent."""

    def hello(self) -> Hello: ...

    def authorize_router(self, hello: Hello, ssl_object: ssl.SSLObject | None) -> None:
        """Raises ``PeerError`` when this peer may not be a router here."""

    def router_joined(self, link: RouterLink) -> None: ...

    def router_left(self, link: RouterLink) -> None: ...

    def submit(self, link: RouterLink, submit: Submit) -> None: ...

    def cancel(self, link: RouterLink, stream: int) -> None: ...

    def retarget(self, link: RouterLink, message: Retarget) -> None: ...

    def attach(self, link: RouterLink, question: Attach) -> None: ...

    def drill(self, link: RouterLink, drill: Drill) -> None: ...

    def warm(self, message: Warm) -> None: ...


class RouterLink(asyncio.Protocol):
    """Protocol object of one accepted connection; ``version`` is 0 until the router said Hello."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._reader = node_side_reader()
        self._writer = FrameWriter()
        self._transport: asyncio.Transport | None = None
        self._greeted = False
        self._stalled_at: float | None = None
        self._heard_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._entries: list[StepEntry] = []
        self._entry_bytes = 0
        self.router = ""
        self.version = 0

    # ---- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._transport.set_write_buffer_limits(high=256 * 1024)
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(HELLO_TIMEOUT_S, self._watch)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            for message in self._reader.feed(data):
                self._handle(message)
        except PeerError as exc:
            self.close(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None
        if self._greeted:
            self._greeted = False
            self._agent.router_left(self)

    def pause_writing(self) -> None:
        self._stalled_at = self._loop.time()

    def resume_writing(self) -> None:
        self._stalled_at = None
        self._write_bulk()

    # ---- for the agent -------------------------------------------------------------------------

    def emit(self, entry: StepEntry) -> None:
        """Add an entry to the ``Step`` frame that the next ``flush`` sends; one that goes on where
        the last one ended becomes part of it."""
        last = self._entries[-1] if self._entries else None
        if (
            last is not None
            and last.stream == entry.stream
            and last.index + len(last.ids) == entry.index
        ):
            self._entries[-1] = StepEntry(
                *(last.stream, last.index, last.ids + entry.ids, last.text + entry.text)
            )
        else:
            self._entries.append(entry)
        self._entry_bytes += 40 + len(entry.text) + 9 * len(entry.ids)
        if self._entry_bytes > STEP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what ``emit`` collected, as one frame."""
        if self._entries:
            entries, self._entries, self._entry_bytes = self._entries, [], 0
            self._write(self._writer.push(Step(entries)))

    def say(self, message: NodeMessage) -> None:
        """Send a message; entries emitted before it leave before it."""
        self.flush()
        self._write(self._writer.push(message))
        self._write_bulk()

    def close(self, error: PeerError | None = None) -> None:
        """Say why, if there is a reason, and close after what is buffered is written."""
        if self._transport is None or self._transport.is_closing():
            return
        if error is not None:
            log.warning("link to router %s closed: %s", self.router or "?", error.message)
            self._transport.write(encode(Goodbye(error.code, error.message[:500])))
        self._transport.close()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(CLOSE_WAIT_S, self._transport.abort)

    # ---- inside --------------------------------------------------------------------------------

    def _handle(self, message: RouterMessage) -> None:
        match message:
            case Ping(nonce):
                self._write(encode(Pong(nonce)))
            case Hello():
                self._hello(message)
            case Submit() if self._greeted:
                self._agent.submit(self, message)
            case Cancel(stream) if self._greeted:
                self._agent.cancel(self, stream)
            case Retarget() if self._greeted:
                self._agent.retarget(self, message)
            case Attach() if self._greeted:
                self._agent.attach(self, message)
            case Drill() if self._greeted:
                self._agent.drill(self, message)
            case Warm() if self._greeted:
                self._agent.warm(message)
            case Pong():
                pass
            case Goodbye(code, text):
                log.info("router %s says goodbye: %s %s", self.router or "?", code, text)
                self.close()
            case _:
                raise PeerError(
                    f"{type(message).__name__} before Hello", code="protocol_error", retryable=False
                )

    def _hello(self, hello: Hello) -> None:
        if self._greeted:
            raise PeerError("a second Hello", code="protocol_error", retryable=False)
        assert self._transport is not None
        version = negotiate(MIN_VERSION, MAX_VERSION, hello.min_version, hello.max_version)
        self._agent.authorize_router(hello, self._transport.get_extra_info("ssl_object"))
        self._greeted = True
        self.router, self.version = hello.name, version
        self._write(encode(self._agent.hello()))
        self._agent.router_joined(self)

    def _watch(self) -> None:
        """Look from time to time whether the router is still there, and reads."""
        now = self._loop.time()
        if not self._greeted:
            self.close(PeerError("no Hello in time", code="protocol_error", retryable=False))
        elif now - self._heard_at >= SILENCE_S:
            self.close(PeerError("the router has gone silent", code="link_lost"))
        elif self._stalled_at is not None and now - self._stalled_at >= STALL_S:
            self.close(PeerError("the router does not read", code="link_lost"))
        else:
            self._timer = self._loop.call_later(WATCH_PERIOD_S, self._watch)

    def _write(self, frame: bytes) -> None:
        transport = self._transport
        if transport is None or not frame:
            return
        transport.write(frame)
        if transport.get_write_buffer_size() > MAX_WRITE_BUFFER_BYTES:
            log.warning("router %s does not read; its link is cut", self.router)
            transport.abort()

    def _write_bulk(self) -> None:
        while self._stalled_at is None and self._transport is not None:
            frame = self._writer.next_bulk()
            if not frame:
                return
            self._write(frame)


def link_factory(agent: Agent) -> Callable[[], RouterLink]:
    """Protocol factory for ``loop.create_server``."""
    return lambda: RouterLink(agent)
