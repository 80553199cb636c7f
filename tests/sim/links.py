"""Ordered reliable byte streams between hosts, and what can go wrong with them.

A message sent on one end arrives at the other after queueing, serialisation and propagation, in
order. A path that is down delays what is on it until it heals, as retransmission does; a connection
that vanished loses everything without a word; a closed one says so, in order, if its path is up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tests.sim.clock import Process, Simulation

SYN_RETRY_S = 1.0
"""First retransmission of a lost SYN. Source: RFC 6298."""

RETRANSMIT_S = 0.2
"""How long after a path healed the first segment that was lost on it comes again."""

_EOF = object()


class Path:
    """One direction between two hosts."""

    __slots__ = ("bytes_per_s", "down", "latency_s", "stalled", "waiting")

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.down = 0  # faults that hold it down
        self.stalled: dict[End, None] = {}
        self.waiting: list[tuple[Process, Callable[[], None]]] = []  # for room in a socket


class Handler(Protocol):
    """Whose end it is."""

    def on_message(self, message: Any) -> None: ...

    def on_lost(self) -> None:
        """The connection is gone; never said after this side closed it."""


class End:
    """One end of a connection."""

    __slots__ = (
        "_arrival",
        "_held",
        "busy",
        "closed",
        "handler",
        "path",
        "peer",
        "process",
        "vanished",
    )

    def __init__(self, process: Process, path: Path) -> None:
        self.process = process
        self.path = path
        self.peer: End = self
        self.handler: Handler | None = None
        self.closed = False
        self.vanished = False
        self.busy = 0.0  # when everything written so far is out
        self._arrival = 0.0
        self._held: list[Any] = []
        process.ends[self] = None

    def send(self, message: Any, nbytes: int = 100) -> None:
        """Write ``message``; nothing happens on a closed end."""
        if not self.closed:
            self._push(message, nbytes)

    def close(self) -> None:
        """End it from this side; the other side hears of it after everything sent."""
        if self.closed:
            return
        self.closed = True
        self.process.ends.pop(self, None)
        self._push(_EOF, 40)

    def vanish(self) -> None:
        """From now on nothing arrives in either direction."""
        for end in (self, self.peer):
            end.vanished = True
            end._held.clear()

    def reset(self) -> None:
        """Both sides lose the connection now, and what was on its way."""
        self.vanish()
        for end in (self, self.peer):
            if not end.closed:
                end.closed = True
                end.process.ends.pop(end, None)
                if end.handler is not None:
                    end.process.sim.at(end.process.sim.now, end.process, end.handler.on_lost)

    def _push(self, message: Any, nbytes: int) -> None:
        if self.vanished:
            return
        path, sim = self.path, self.process.sim
        now = sim.now
        self.busy = (self.busy if self.busy > now else now) + nbytes / path.bytes_per_s
        arrival = self.busy + path.latency_s
        self._arrival = arrival = arrival if arrival > self._arrival else self._arrival
        sim.at(arrival, self.peer.process, self._arrive, message)

    def _arrive(self, message: Any) -> None:
        if self.vanished:
            return
        if self.path.down or self._held:
            self._held.append(message)
            self.path.stalled[self] = None
            return
        self._deliver(message)

    def _deliver(self, message: Any) -> None:
        peer = self.peer
        if peer.closed:
            return
        watcher = self.process.sim.on_delivery
        if watcher is not None and message is not _EOF and not watcher(self, message):
            return
        if message is not _EOF:
            if peer.handler is not None:
                peer.handler.on_message(message)
            return
        peer.closed = True
        peer.process.ends.pop(peer, None)
        if peer.handler is not None:
            peer.handler.on_lost()

    def resume(self) -> None:
        """The path is up again: what was held arrives after a retransmission, then the rest."""
        sim = self.process.sim
        sim.at(sim.now + RETRANSMIT_S + self.path.latency_s, self.peer.process, self._catch_up)

    def _catch_up(self) -> None:
        if self.path.down:  # again
            self.path.stalled[self] = None
            return
        held, self._held = self._held, []
        for message in held:
            self._deliver(message)


class Listener(Protocol):
    """Who accepts connections at an address."""

    @property
    def process(self) -> Process: ...

    def accept(self, end: End) -> None: ...


class Dial:
    """A connection attempt that may be given up."""

    __slots__ = ("cancelled",)

    def __init__(self) -> None:
        self.cancelled = False


class Network:
    """Hosts, the paths between them, and who listens where."""

    def __init__(self, sim: Simulation, latency: Callable[[str, str], tuple[float, float]]) -> None:
        """``latency(host, host)`` gives one-way seconds and bytes/s."""
        self.sim = sim
        self.listeners: dict[str, tuple[str, Listener]] = {}
        self._latency = latency
        self._paths: dict[tuple[str, str], Path] = {}

    def path(self, a: str, b: str) -> Path:
        """The direction from host ``a`` to host ``b``."""
        found = self._paths.get((a, b))
        if found is None:
            found = self._paths[a, b] = Path(*self._latency(a, b))
        return found

    def listen(self, address: str, host: str, listener: Listener) -> None:
        self.listeners[address] = (host, listener)

    def break_path(self, a: str, b: str) -> None:
        """Packets from ``a`` to ``b`` vanish until ``mend_path``."""
        self.path(a, b).down += 1

    def mend_path(self, a: str, b: str) -> None:
        path = self.path(a, b)
        path.down -= 1
        if path.down:
            return
        stalled, path.stalled = path.stalled, {}
        for end in stalled:
            end.resume()
        waiting, path.waiting = path.waiting, []
        for process, function in waiting:
            self.sim.at(self.sim.now, process, function)

    def connect(self, process: Process, address: str, done: Callable[[End | None], None]) -> Dial:
        """Dial; ``done`` gets this side's end, or None when nobody listens there."""
        dial = Dial()
        self._syn(dial, process, address, done)
        return dial

    def _syn(
        self, dial: Dial, process: Process, address: str, done: Callable[[End | None], None]
    ) -> None:
        if dial.cancelled or not process.alive:
            return
        sim = self.sim
        found = self.listeners.get(address)
        host = found[0] if found is not None else process.host
        out, back = self.path(process.host, host), self.path(host, process.host)
        if out.down or back.down:
            sim.at(sim.now + SYN_RETRY_S, None, self._syn, dial, process, address, done)
            return
        sim.at(sim.now + out.latency_s, None, self._meet, dial, process, address, host, done)

    def _meet(
        self,
        dial: Dial,
        process: Process,
        address: str,
        host: str,
        done: Callable[[End | None], None],
    ) -> None:
        if dial.cancelled or not process.alive:
            return
        sim, back = self.sim, self.path(host, process.host)
        found = self.listeners.get(address)
        if found is None or not found[1].process.alive:
            sim.at(sim.now + back.latency_s, process, self._answer, dial, done, None)
            return
        listener = found[1]
        ours = End(process, self.path(process.host, host))
        theirs = End(listener.process, back)
        ours.peer, theirs.peer = theirs, ours
        sim.at(sim.now + back.latency_s, process, self._answer, dial, done, ours)
        sim.at(sim.now, listener.process, listener.accept, theirs)

    @staticmethod
    def _answer(dial: Dial, done: Callable[[End | None], None], end: End | None) -> None:
        if not dial.cancelled:
            done(None if end is None or end.closed else end)  # closed: reset before it was used
        elif end is not None:
            end.close()
