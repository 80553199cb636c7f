"""Keeping one registration alive: what to tell the registry next.

Pure: events and the time in, effects out; ``registry.keeper`` is the shell. The machine compares
what the registry is known to have taken with what is wanted, and closes the gap with one call at a
time: register (also to change the metadata), heartbeat, deregister. A registry that does not know
the instance any more has taken nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from registry.backoff import backoff_s
from registry.entries import Registration, Status

HEARTBEATS_PER_TTL = 3
"""Two heartbeats may get lost before the instance counts as critical."""

CLOSE_WITHIN_S = 3.0
"""How long closing may try to deregister. Guess; after it the TTL takes the instance away."""


@dataclass(frozen=True, slots=True)
class Start:
    """Begin to keep."""


@dataclass(frozen=True, slots=True)
class Done:
    """The call that was out succeeded."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """The registry does not know the instance; ``jitter`` is uniform in [0, 1)."""

    jitter: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The call that was out failed; ``jitter`` is uniform in [0, 1)."""

    jitter: float


@dataclass(frozen=True, slots=True)
class SetMeta:
    """Replace the metadata, for instance to say that the node drains."""

    meta: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SetStatus:
    """Report another health from now on."""

    status: Status
    note: str


@dataclass(frozen=True, slots=True)
class Close:
    """Deregister and end."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline passed."""


Event = Start | Done | Unknown | Failed | SetMeta | SetStatus | Close | Tick


@dataclass(frozen=True, slots=True)
class Register:
    """Register or replace the instance, with this health."""

    registration: Registration
    status: Status


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Report this health."""

    status: Status
    note: str


@dataclass(frozen=True, slots=True)
class Deregister:
    """Forget the instance."""


Call = Register | Heartbeat | Deregister


class Keep:
    """The state of one kept registration. At most one call is out at a time."""

    def __init__(
        self, registration: Registration, *, status: Status = "passing", note: str = ""
    ) -> None:
        self._wanted = registration
        self._wanted_health = (status, note)
        self._taken: Registration | None = None
        self._taken_health: tuple[Status, str] | None = None
        self._call: Call | None = None
        self._called_at = 0.0
        self._call_at: float | None = None  # no call before this time; None: not started
        self._beat_at = 0.0
        self._failures = 0
        self._may_exist = False
        self._close_until: float | None = None
        self._ended = False

    @property
    def ended(self) -> bool:
        """Closed: deregistered, or given up trying. Nothing more will come."""
        return self._ended

    @property
    def settled(self) -> bool:
        """The registry has taken everything that is wanted."""
        return self._taken == self._wanted and self._taken_health == self._wanted_health

    def next_deadline(self) -> float | None:
        """When to call ``handle(Tick(), now)``; None while only other events change anything."""
        if self._ended:
            return None
        if self._call_at is None or self._call is not None:
            return self._close_until
        if self._close_until is not None:
            return min(self._call_at, self._close_until)
        return max(self._call_at, self._beat_at) if self.settled else self._call_at

    def handle(self, event: Event, now: float) -> Call | None:
        """Take one event at time ``now`` (seconds, monotonic); the call to make, if any."""
        match event:
            case Start():
                self._call_at = now
            case Done():
                self._take_success()
            case Unknown(jitter):
                # A registry that takes registrations and forgets them is asked ever more rarely.
                self._taken = self._taken_health = None
                self._take_failure(now, jitter, at_once=self._failures == 0)
            case Failed(jitter):
                self._take_failure(now, jitter, at_once=False)
            case SetMeta(meta):
                self._wanted = replace(self._wanted, meta=dict(meta))
            case SetStatus(status, note):
                self._wanted_health = (status, note)
            case Close():
                self._close(now)
            case Tick():
                pass
        return self._next(now)

    def _take_success(self) -> None:
        match self._finish():
            case Register(registration, status):
                self._taken, self._taken_health = registration, (status, "")
            case Heartbeat(status, note):
                self._taken_health = (status, note)
                self._failures = 0
            case Deregister():
                self._ended = True
        self._beat_at = self._called_at + self._wanted.ttl_s / HEARTBEATS_PER_TTL

    def _take_failure(self, now: float, jitter: float, *, at_once: bool) -> None:
        if isinstance(self._finish(), Register):
            self._taken = self._taken_health = None  # it may have arrived, in part or not
        self._failures += 1
        self._call_at = now if at_once else now + backoff_s(self._failures, jitter)

    def _finish(self) -> Call:
        assert self._call is not None, "an outcome of no call"
        call, self._call = self._call, None
        return call

    def _close(self, now: float) -> None:
        if self._close_until is None:
            self._close_until = now + CLOSE_WITHIN_S
            self._failures = 0
            if self._call_at is not None:
                self._call_at = now

    def _next(self, now: float) -> Call | None:
        if self._ended:
            return None
        if self._close_until is not None and (not self._may_exist or now >= self._close_until):
            self._ended = True
            return None
        if self._call is not None or self._call_at is None or now < self._call_at:
            return None
        if self._close_until is not None:
            return self._make(Deregister(), now)
        status, note = self._wanted_health
        if self._taken != self._wanted:
            self._may_exist = True
            return self._make(Register(self._wanted, status), now)
        if self._taken_health != self._wanted_health or now >= self._beat_at:
            return self._make(Heartbeat(status, note), now)
        return None

    def _make(self, call: Call, now: float) -> Call:
        self._call = call
        self._called_at = now
        return call
