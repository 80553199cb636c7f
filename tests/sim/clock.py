"""Virtual time: one heap of events, and processes that may be frozen or killed.

Everything that happens in a simulated mesh is an event of this heap, so a run is a pure function of
its seed. A process has its own monotonic clock (offset and rate); its shells know no other. While
an event of a process is carried out, that process is what ``asyncio.get_running_loop()`` returns,
so shells of the product that need no more of a loop than a clock and timers run as they are.
"""

from __future__ import annotations

import asyncio.events
import heapq
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Event = list[Any]
"""``[when, number, process, function, args]``; a cancelled one has no function."""

_enter: Callable[[Any], None] = asyncio.events._set_running_loop

_ROUNDING_S = 1e-9
"""A timer fires this much late, so that rounding never makes it fire too early."""


class RunawayError(AssertionError):
    """Something goes round in circles without time passing, or far too often."""


class Simulation:
    """The heap and the clock. ``rng`` is the only source of chance in a run.

    ``on_delivery(end or engine, message)`` sees each message before it arrives; False: it does not.
    """

    __slots__ = (
        "_heap",
        "_lines",
        "_number",
        "crc",
        "events",
        "max_events",
        "now",
        "on_delivery",
        "rng",
    )

    def __init__(
        self, seed: int, *, lines: list[str] | None = None, hashed: bool = False, max_events: int
    ) -> None:
        """``lines`` collects a readable trace, ``hashed`` keeps ``crc`` of it."""
        self.now = 0.0
        self.rng = random.Random(seed)
        self.on_delivery: Callable[[Any, Any], bool] | None = None
        self.events = 0
        self.max_events = max_events
        self.crc: int | None = 0 if hashed or lines is not None else None
        self._lines = lines
        self._heap: list[Event] = []
        self._number = 0

    def at(
        self, when: float, process: Process | None, function: Callable[..., object], *args: Any
    ) -> Event:
        """Call ``function(*args)`` at ``when``, in ``process`` if that still lives then."""
        self._number += 1
        event = [when, self._number, process, function, args]
        heapq.heappush(self._heap, event)
        return event

    def again(self, event: Event) -> None:
        """Put an event that was held back into the heap, due now; it may still be cancelled."""
        self._number += 1
        event[0], event[1] = self.now, self._number
        heapq.heappush(self._heap, event)

    def run(self, until: float) -> None:
        """Carry out everything that is due up to ``until``."""
        outside = asyncio.events._get_running_loop()
        try:
            self._run(until)
        finally:
            _enter(outside)
        self.now = until

    def _run(self, until: float) -> None:
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            event = pop(heap)
            when, _, process, function, args = event
            if function is None:
                continue
            self.now = when
            self.events += 1
            if process is not None:
                if not process.alive:
                    continue
                if process.frozen:
                    process.backlog.append(event)
                    continue
            if self.crc is not None:
                self.note(process, function, args)
            _enter(process)
            function(*args)
            if self.events > self.max_events:
                raise RunawayError(f"more than {self.max_events} events by {self.now:.3f} s")

    def note(self, process: Process | None, what: object, args: tuple[Any, ...] = ()) -> None:
        """Put a line into the trace, if there is one."""
        if self.crc is None:
            return
        name = what if isinstance(what, str) else getattr(what, "__qualname__", "?")
        where = "-" if process is None else process.name
        line = f"{self.now:.6f} {where} {name} {' '.join(map(_brief, args))}"
        self.crc = zlib.crc32(line.encode(), self.crc)
        if self._lines is not None:
            self._lines.append(line)


def _brief(value: object) -> str:
    """A value of the trace; objects without a repr of their own only say their type."""
    text = repr(value)
    return type(value).__name__ if " object at 0x" in text else text[:400]


class Timer:
    """What ``call_at`` returns, as ``asyncio.TimerHandle``."""

    __slots__ = ("_event",)

    def __init__(self, event: Event) -> None:
        self._event = event

    def cancel(self) -> None:
        """Do not call; harmless afterwards."""
        self._event[3] = None


def cancel(timer: Timer | None) -> None:
    """A timer that is not wanted any more, if there is one."""
    if timer is not None:
        timer.cancel()


class Process:
    """One process on ``host``: alive, perhaps frozen, with a clock of its own."""

    __slots__ = ("_offset", "_rate", "alive", "backlog", "ends", "frozen", "host", "name", "sim")

    def __init__(self, sim: Simulation, name: str, host: str) -> None:
        self.sim = sim
        self.name = name
        self.host = host
        self.alive = True
        self.frozen = False
        self.backlog: list[Event] = []
        self.ends: dict[Any, None] = {}  # open ends of connections, in the order they were made
        self._offset = sim.rng.uniform(0.0, 1e5)
        self._rate = sim.rng.uniform(0.999, 1.001)

    def time(self) -> float:
        """This process's monotonic clock, seconds."""
        return self._offset + self.sim.now * self._rate

    @contextmanager
    def running(self) -> Iterator[None]:
        """What happens inside happens in this process, as in its events."""
        outside = asyncio.events._get_running_loop()
        _enter(self)
        try:
            yield
        finally:
            _enter(outside)

    def call_at(self, when: float, function: Callable[..., object], *args: Any) -> Timer:
        """A timer on this process's clock."""
        sim = self.sim
        at = (when - self._offset) / self._rate + _ROUNDING_S
        return Timer(sim.at(max(sim.now, at), self, function, *args))

    def call_soon(self, function: Callable[..., object], *args: Any) -> Timer:
        """As soon as this event is over."""
        return self.call_later(0.0, function, *args)

    def call_later(self, delay_s: float, function: Callable[..., object], *args: Any) -> Timer:
        """A timer ``delay_s`` of this process's seconds from now."""
        sim = self.sim
        return Timer(sim.at(sim.now + delay_s / self._rate, self, function, *args))

    def freeze(self) -> None:
        """SIGSTOP: what comes waits."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT: what waited happens now, in its order."""
        if not self.frozen:
            return
        self.frozen = False
        waiting, self.backlog = self.backlog, []
        for event in waiting:
            self.sim.again(event)

    def kill(self) -> None:
        """SIGKILL: nothing more happens here; the kernel closes what was open."""
        if not self.alive:
            return
        self.alive = self.frozen = False
        self.backlog.clear()
        for end in list(self.ends):
            end.close()
