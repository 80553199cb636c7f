"""A shaped connection's two pipes, and the link direction that carries them.

Owns the order of bytes and ends on their way through a ``Direction``; who may connect to whom
is the shaper's. When bytes move is decided by ``FairQueue``, ``DelayLine`` and ``Weather``.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never, cast

from popmesh.links.delay_line import DelayLine
from popmesh.links.fair_queue import FairQueue
from popmesh.links.plan import Figures
from popmesh.links.weather import Weather

RESUME_SHARE = 0.75
"""Of a full buffer, when reading goes on. More than half: what is in flight leaves no queue there,
and the link would idle until the next read."""

EARLY_S = 0.0005
"""Deliveries due within half a timer tick (uvloop: 1 ms) go out now rather than a tick late."""


class End(Enum):
    """How a stream of bytes ends."""

    HALF_CLOSE = 1
    RESET = 2


Item = memoryview | End


class Direction:
    """One direction of one site pair: all its connections share the rate, one timer drives it.

    While it is down everything on it stands still and senders see nothing but their windows fill.
    When it comes back the bytes go on, in order, as TCP would have repeated them; how long its
    timers would have slept on is not modelled.
    """

    def __init__(self, figures: Figures, rng: random.Random) -> None:
        self.line = DelayLine(figures.rate_bytes_per_s, figures.one_way_s)
        self.up = asyncio.Event()
        self._rng = rng
        self._queue: FairQueue[Pipe, Item] = FairQueue(self.line)
        self._flying: list[tuple[float, int, Pipe, Item]] = []  # a heap, by arrival
        self._order = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.configure(figures)

    def configure(self, figures: Figures) -> None:
        """New figures, for bytes that are not on their way yet."""
        self.line.configure(figures.rate_bytes_per_s, figures.one_way_s)
        self._weather = Weather(figures.loss, figures.jitter_s, figures.rtt_s)
        if figures.down:
            self.up.clear()
        elif not self.up.is_set():
            self.up.set()
            self._resume(time.monotonic())

    def send(self, pipe: Pipe, items: list[Item]) -> None:
        """Put a pipe's next items on their way."""
        now = time.monotonic()
        for item in items:
            nbytes = item.nbytes if isinstance(item, memoryview) else 0
            self._queue.offer(pipe, nbytes, item, now)
        self._advance(now)

    def forget(self, pipe: Pipe) -> None:
        """Drop what a pipe has on its way: nobody repeats it any more."""
        self._queue.forget(pipe)
        self._flying = [entry for entry in self._flying if entry[2] is not pipe]
        heapq.heapify(self._flying)

    def handshake_s(self) -> float:
        """How long until a connection asked for now is asked for at the other end."""
        return self.line.delay_s + self._weather.handshake_s(self._rng)

    def _resume(self, now: float) -> None:
        """Everything starts again: what was flying takes the way once more."""
        self.line.hold(now)
        again = now + self.line.delay_s
        self._flying = [
            (max(at, again), order, pipe, item) for at, order, pipe, item in self._flying
        ]
        heapq.heapify(self._flying)
        self._advance(now)

    def _advance(self, now: float) -> None:
        if not self.up.is_set():
            return
        for at, pipe, item in self._queue.commit(now):
            self._fly(at, pipe, item)
        due: dict[Pipe, None] = {}
        while self._flying and self._flying[0][0] <= now + EARLY_S:
            _, _, pipe, item = heapq.heappop(self._flying)
            pipe.arrived.append(item)
            due[pipe] = None
        for pipe in due:
            pipe.flush()
        self._arm(now)

    def _fly(self, at: float, pipe: Pipe, item: Item) -> None:
        nbytes = item.nbytes if isinstance(item, memoryview) else 0
        at += self._weather.extra_s(nbytes, pipe.held_bytes - nbytes, self._rng)
        pipe.not_before = at = max(at, pipe.not_before)  # one connection's bytes keep their order
        heapq.heappush(self._flying, (at, self._order, pipe, item))
        self._order += 1

    def _arm(self, now: float) -> None:
        deadlines = [self._flying[0][0]] if self._flying else []
        if (queued := self._queue.next_deadline()) is not None:
            deadlines.append(queued)
        if not deadlines:
            return
        wake_at = min(deadlines)
        if self._timer is not None:
            if self._timer_at <= wake_at:
                return
            self._timer.cancel()
        self._timer_at = wake_at
        self._timer = asyncio.get_running_loop().call_later(max(wake_at - now, 0.0), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._advance(time.monotonic())


@dataclass(eq=False, slots=True)
class Pipe:
    """One connection in one direction: ``source`` is read, ``sink`` is written (None: not yet)."""

    direction: Direction
    source: asyncio.Transport | None = None
    sink: asyncio.Transport | None = None
    held_bytes: int = 0
    sink_full: bool = False
    source_paused: bool = False
    not_before: float = 0.0
    ended: bool = False
    end_delivered: bool = False
    arrived: deque[Item] = field(default_factory=deque)
    reverse: Pipe | None = None

    def feed(self, data: bytes) -> None:
        """Bytes read from the source enter the link; a full buffer pauses the source."""
        view = memoryview(data)
        line = self.direction.line
        self.held_bytes += len(view)
        if self.held_bytes > line.buffer_bytes:
            self._pause_source(True)
        size = line.piece_bytes
        self.direction.send(self, [view[at : at + size] for at in range(0, len(view), size)])

    def finish(self, end: End) -> None:
        """The source has ended; the end follows the data. A reset may follow a half-close."""
        if not self.ended or end is End.RESET:
            self.ended = True
            if end is End.RESET and not self.direction.up.is_set():
                self.direction.forget(self)  # a dead socket repeats nothing
            self.direction.send(self, [end])

    def flush(self) -> None:
        """Write what has arrived, as far as the sink takes it."""
        while self.arrived and self.sink is not None and not self.sink_full:
            self._write(self.sink, self.arrived.popleft())
        if (
            self.source_paused
            and self.held_bytes <= RESUME_SHARE * self.direction.line.buffer_bytes
        ):
            self._pause_source(False)

    def _write(self, sink: asyncio.Transport, item: Item) -> None:
        if isinstance(item, memoryview):
            self.held_bytes -= item.nbytes
            if not sink.is_closing():
                sink.write(item)
            return
        self.end_delivered = True
        if sink.is_closing():
            return
        match item:
            case End.HALF_CLOSE:
                sink.write_eof()
                if self.reverse is not None and self.reverse.end_delivered:
                    self.close()
            case End.RESET:
                reset(sink)
            case _:
                assert_never(item)

    def close(self) -> None:
        """Close both sockets in order: what they still have to write is written."""
        for transport in (self.source, self.sink):
            if transport is not None:
                transport.close()

    def _pause_source(self, pause: bool) -> None:
        self.source_paused = pause
        if self.source is not None and not self.source.is_closing():
            if pause:
                self.source.pause_reading()
            else:
                self.source.resume_reading()


def reset(transport: asyncio.Transport) -> None:
    """Close with a reset instead of an orderly end."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def pipe_pair(forward: Direction, backward: Direction) -> tuple[Pipe, Pipe]:
    """The two pipes of one connection."""
    there, back = Pipe(forward), Pipe(backward)
    there.reverse, back.reverse = back, there
    return there, back


class Endpoint(asyncio.Protocol):
    """One of a connection's two sockets: the source of ``outgoing``, the sink of ``incoming``."""

    def __init__(self, outgoing: Pipe, incoming: Pipe) -> None:
        self.outgoing = outgoing
        self.incoming = incoming

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.outgoing.source = self.incoming.sink = cast(asyncio.Transport, transport)
        self.incoming.flush()

    def data_received(self, data: bytes) -> None:
        self.outgoing.feed(data)

    def eof_received(self) -> bool:
        self.outgoing.finish(End.HALF_CLOSE)
        return True  # stay open for the other direction

    def pause_writing(self) -> None:
        self.incoming.sink_full = True

    def resume_writing(self) -> None:
        self.incoming.sink_full = False
        self.incoming.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        # An orderly end was announced by eof_received; whatever else ends a socket is a reset.
        self.outgoing.finish(End.RESET)
        self.resume_writing()  # what still arrives drains into nowhere
