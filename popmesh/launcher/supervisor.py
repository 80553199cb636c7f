"""When to start, restart, stop and give up on one child. Pure: knows no process and no clock.

    idle --Start--> running --Exited--> waiting --(backoff)--> running
                       |                   |
                  StopRequested       StopRequested
                       v                   v
                   stopping --Exited-->  gone

A child that never was healthy is given up after a few tries, so that a mesh that cannot start says
so; one that once was healthy is restarted for as long as the launcher runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
"""Backoff doubles between these. Guess: fast enough to rehearse a crash, slow enough not to burn
a core on a process that dies at once."""

STABLE_S = 30.0
"""A run at least this long makes the next crash count as the first. Guess."""

MAX_FIRST_TRIES = 4
"""Starts that may fail before the child has been healthy once: 0.5 + 1 + 2 s of waiting."""

CONFIG_EXIT_CODE = 2
"""``popmesh`` exits with it on a configuration it refuses: trying again cannot help."""

GRACE_S = 15.0
"""Between SIGTERM and SIGKILL: a node ends what is running first. Guess."""


@dataclass(frozen=True, slots=True)
class Start:
    """Begin."""


@dataclass(frozen=True, slots=True)
class Exited:
    """The process ended; a negative ``code`` is the signal that killed it."""

    code: int


@dataclass(frozen=True, slots=True)
class Healthy:
    """The process proved that it works."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """End for good."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline has come."""


Event = Start | Exited | Healthy | StopRequested | Tick


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the process."""


@dataclass(frozen=True, slots=True)
class Terminate:
    """Send SIGTERM."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Send SIGKILL to its whole group."""


@dataclass(frozen=True, slots=True)
class Restarting:
    """Will spawn again after ``delay_s``; ``code`` is how it ended."""

    code: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class GaveUp:
    """It will not be started again; ``code`` is how it ended, ``tries`` counts its starts."""

    code: int
    tries: int


Effect = Spawn | Terminate | Kill | Restarting | GaveUp
State = Literal["idle", "running", "waiting", "stopping", "gone"]


class ChildMachine:
    """The policy for one child."""

    def __init__(self) -> None:
        self.state: State = "idle"
        self._was_healthy = False
        self._failures = 0
        self._started_at = 0.0
        self._deadline: float | None = None

    def next_deadline(self) -> float | None:
        """When to send ``Tick``."""
        return self._deadline

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Effects to carry out, in order. Events that no longer matter have none."""
        match event:
            case Start():
                return self._spawn(now) if self.state == "idle" else []
            case Exited(code):
                return self._exited(code, now)
            case Healthy():
                self._was_healthy = True
                return []
            case StopRequested():
                return self._stop(now)
            case Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    def _spawn(self, now: float) -> list[Effect]:
        self.state = "running"
        self._started_at = now
        self._deadline = None
        return [Spawn()]

    def _exited(self, code: int, now: float) -> list[Effect]:
        if self.state == "stopping":
            self.state, self._deadline = "gone", None
            return []
        if self.state != "running":
            return []
        self._failures = 1 if now - self._started_at >= STABLE_S else self._failures + 1
        hopeless = code == CONFIG_EXIT_CODE or self._failures >= MAX_FIRST_TRIES
        if hopeless and not self._was_healthy:
            self.state = "gone"
            return [GaveUp(code, self._failures)]
        delay_s = min(FIRST_DELAY_S * 2.0 ** min(self._failures - 1, 16), MAX_DELAY_S)
        self.state, self._deadline = "waiting", now + delay_s
        return [Restarting(code, delay_s)]

    def _stop(self, now: float) -> list[Effect]:
        if self.state == "running":
            self.state, self._deadline = "stopping", now + GRACE_S
            return [Terminate()]
        if self.state in ("idle", "waiting"):
            self.state, self._deadline = "gone", None
        return []

    def _tick(self, now: float) -> list[Effect]:
        if self._deadline is None or now < self._deadline:
            return []
        if self.state == "waiting":
            return self._spawn(now)
        self._deadline = None  # stopping: SIGKILL cannot be ignored, nothing to wait for after it
        return [Kill()]
