"""What is known of one model on this node, and how long it would take to answer. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Disk = Literal["absent", "fetching", "here"]
Memory = Literal["out", "queued", "loading", "warm", "leaving"]

START_S = 2.0
"""Start of an engine without reading weights, before one was measured. Measured: 0.3 s from a
process that stands by, 2 s with its imports, on two busy cores."""

LOAD_BYTES_PER_S = 1e9
"""Until a load was measured here. Guess: a cloud disk."""

FETCH_S = 60.0
"""A fetch of which nothing is known yet. Guess: some gigabytes at 1 Gbit/s."""


@dataclass(slots=True)
class ModelState:
    """One model. Times are seconds of the machine's clock.

    ``memory_bytes`` and ``load_bytes`` are 0 until the model has been on the disk. ``again``: it is
    wanted back before it has left. ``barred``: a drill has it. ``arriving``: an engine can begin
    with what is here. ``retry_at``: when what failed is tried again, or may be. ``why_failed`` is
    for everybody, clients too; ``engine_said``, if an engine failed, for who looks after nodes: it
    may name what is on a disk.
    """

    name: str
    pinned: bool
    fetchable: bool
    disk: Disk = "absent"
    memory: Memory = "out"
    memory_bytes: int = 0
    load_bytes: int = 0
    legs: int = 0
    held_until: float = -math.inf
    wanted_until: float = -math.inf
    used_at: float = -math.inf
    since: float = 0.0
    again: bool = False
    barred: bool = False
    arriving: bool = False
    failures: int = 0
    retry_at: float = -math.inf
    why_failed: str = ""
    engine_said: str = ""
    last_load_s: float = 0.0
    left_bytes: int = 0
    fetch_bytes_per_s: float = 0.0

    @property
    def is_committed(self) -> bool:
        """Its memory is its own or will be: nobody else may count on it."""
        return self.memory in ("queued", "loading", "warm") or self.again or self.barred

    @property
    def is_loadable(self) -> bool:
        """An engine can begin to load it."""
        return self.disk == "here" or self.arriving

    @property
    def is_resident(self) -> bool:
        """An engine has its memory now."""
        return self.memory in ("loading", "warm", "leaving")

    @property
    def is_waited_for(self) -> bool:
        """Somebody waits for it, and was not told yet that it is in vain."""
        return self.wanted_until > -math.inf

    @property
    def problem(self) -> str:
        """All that is known of what failed."""
        return f"{self.why_failed}: {self.engine_said}" if self.engine_said else self.why_failed

    @property
    def why_not_up(self) -> str:
        """Why its engine did not come up; empty when it did, or was not tried yet."""
        return self.problem if self.memory == "loading" and self.failures else ""

    def may_leave(self, now: float) -> bool:
        """Nobody uses it, nobody was promised it."""
        idle = self.memory == "warm" and not self.legs
        return idle and not (self.pinned or self.barred or self.is_asked_for(now))

    def is_asked_for(self, now: float) -> bool:
        """Somebody waits for it, or a router wants it kept."""
        return max(self.held_until, self.wanted_until) > now

    def load_s(self, bytes_per_s: float) -> float:
        """From the start of its engine to a token: measured, else estimated."""
        return self.last_load_s or START_S + self.load_bytes / (bytes_per_s or LOAD_BYTES_PER_S)

    def eta_s(self, now: float, bytes_per_s: float) -> float:
        """Until it could answer if it were wanted now and may come. ``bytes_per_s``: measured rate
        of loads on this node, 0 if there was none."""
        load_s = self.load_s(bytes_per_s)
        if self.memory == "warm":
            return 0.0
        fetch_s = 0.0
        if self.disk != "here":
            rate = self.fetch_bytes_per_s
            fetch_s = self.left_bytes / rate if rate and self.left_bytes else FETCH_S
        if self.memory == "loading":
            # One that takes longer than ever before takes longer still.
            return max(load_s - (now - self.since), load_s / 10, fetch_s)
        return load_s + fetch_s
