"""Who goes next on a shared link direction: start-time fair queueing over a ``DelayLine``.

All connections of one site pair share the rate. First come, first served would make a token wait
behind a megabyte of KV in the emulator's own buffer, which real networks avoid with a fair queue
discipline; so does this one: each flow gets an equal share in bytes, and a flow that sends little
goes next. Pure: time is an argument.

Source: start-time fair queueing (Goyal, Vin, Cheng 1996): an item's tag is
``max(virtual time, the flow's last finish tag)``, the lowest tag is served, virtual time is the tag
in service.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

from popmesh.links.delay_line import DelayLine

HORIZON_S = 0.001
"""How far ahead of the clock items are committed: one tick of the event loop's timers (1 ms), so
that a late timer costs no capacity. It is also the most that a small flow waits for a big one."""

PRUNE_FLOWS = 1024
"""Tags kept before those of long-gone flows are dropped. Guess: a busy shaper's connections."""

F = TypeVar("F", bound=Hashable)
T = TypeVar("T")


class FairQueue(Generic[F, T]):
    """Items of several flows on their way into one line. Callers bound what a flow may hold."""

    def __init__(self, line: DelayLine) -> None:
        self.line = line
        self._heap: list[tuple[float, int, float, F, int, T]] = []
        self._finish: dict[F, float] = {}
        self._virtual = 0.0
        self._order = 0

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, flow: F, nbytes: int, item: T, now: float) -> None:
        """Queue ``item`` of ``nbytes`` bytes; items of one flow leave in the order offered."""
        tag = max(self._virtual, self._finish.get(flow, 0.0))
        self._finish[flow] = tag + nbytes
        heapq.heappush(self._heap, (tag, self._order, now, flow, nbytes, item))
        self._order += 1

    def commit(self, now: float) -> list[tuple[float, F, T]]:
        """Put on the line what its rate allows by now: ``(arrival time, flow, item)`` in order."""
        committed: list[tuple[float, F, T]] = []
        while self._heap and self.line.free_at <= now + HORIZON_S:
            tag, _, offered, flow, nbytes, item = heapq.heappop(self._heap)
            self._virtual = tag
            committed.append((self.line.push(offered, nbytes), flow, item))
        if not self._heap:  # idle: every flow starts level again
            self._finish.clear()
            self._virtual = 0.0
        elif len(self._finish) > PRUNE_FLOWS:  # a tag below virtual time says nothing any more
            self._finish = {f: tag for f, tag in self._finish.items() if tag > self._virtual}
        return committed

    def forget(self, flow: F) -> None:
        """Drop what ``flow`` has queued."""
        self._heap = [entry for entry in self._heap if entry[3] != flow]
        heapq.heapify(self._heap)
        self._finish.pop(flow, None)

    def next_deadline(self) -> float | None:
        """When ``commit`` has something to do; None while nothing is queued."""
        return self.line.free_at if self._heap else None
