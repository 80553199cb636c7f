"""Life of a node, decided without IO: when engines start, when the doors open, how it drains.

Owns the order of things; ``pop_node.agent`` carries the effects out. Time is an argument in seconds
of a monotonic clock.

    starting --engines ready--> serving --drain--> draining --no streams or timeout--> stopped
        \\--drain------------------------------------------------------------------------/

Which engines there shall be may change: ``Want`` and ``Unwant``. The doors wait for those that are
wanted from the beginning, unless they are given up or fail to start ``MAX_AWAITED_FAILURES`` times
while another is there to serve. An engine that exits while it is wanted is
started again after a delay that doubles from 0.25 s to 30 s and falls back once the engine has
stayed up for a minute. One that does not become ready in time is ended, and
started again like any other. A node that drains takes no new work, so its engines are not started
again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, assert_never

RESTART_FIRST_S = 0.25
RESTART_MAX_S = 30.0
STABLE_AFTER_S = 60.0
"""Guesses: a crash on one request costs a quarter second, a crash loop costs no CPU."""

READY_WITHIN_S = 600.0
"""Longest start of an engine. Guess: hundreds of gigabytes from a slow disk, kernels compiled; only
one that hangs takes longer."""

MAX_AWAITED_FAILURES = 3
"""Exits in a row after which the doors wait for an engine no more. Guess, as in ``residency``: one
may be bad luck, the same three times is a damaged model, which must not keep the others away."""

State = Literal["starting", "serving", "draining", "stopped"]


@dataclass(frozen=True, slots=True)
class Started:
    """The process is up; engines may start."""


@dataclass(frozen=True, slots=True)
class Want:
    """Start this model's engine, and keep it running."""

    model: str


@dataclass(frozen=True, slots=True)
class Unwant:
    """Start this model's engine no more; whoever says so ends the one that runs."""

    model: str


@dataclass(frozen=True, slots=True)
class EngineReady:
    model: str


@dataclass(frozen=True, slots=True)
class EngineExited:
    model: str


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """Stop accepting work; go when the running streams are done or after ``timeout_s``."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class StreamsLeft:
    count: int


@dataclass(frozen=True, slots=True)
class Tick:
    """The timer armed for ``next_deadline`` fired."""


Event = Started | Want | Unwant | EngineReady | EngineExited | DrainRequested | StreamsLeft | Tick


@dataclass(frozen=True, slots=True)
class StartEngine:
    model: str


@dataclass(frozen=True, slots=True)
class EndEngine:
    """It did not become ready in time; ``EngineExited`` follows."""

    model: str


@dataclass(frozen=True, slots=True)
class OpenDoors:
    """Listen and register: every engine that is waited for has produced a token."""


@dataclass(frozen=True, slots=True)
class AnnounceDrain:
    """Tell routers and the registry that no new work is welcome."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Deregister, close the doors, stop the engines."""


Effect = StartEngine | EndEngine | OpenDoors | AnnounceDrain | Shutdown


@dataclass(slots=True)
class _Engine:
    ready: bool = False
    ready_since: float = 0.0
    failures: int = 0
    restart_at: float | None = None
    ready_by: float | None = None


@dataclass(slots=True)
class NodeLifecycle:
    """State machine of one node.

    ``models`` are started at once. The doors wait for them, and for those of ``later``, which begin
    with their ``Want``.
    """

    models: tuple[str, ...]
    state: State = "starting"
    later: tuple[str, ...] = ()
    _engines: dict[str, _Engine] = field(init=False)
    _waiting_for: set[str] = field(init=False)
    _drain_until: float | None = None

    def __post_init__(self) -> None:
        self._engines = {name: _Engine() for name in self.models}
        self._waiting_for = {*self.models, *self.later}

    def next_deadline(self) -> float | None:
        """When the shell must send ``Tick``."""
        engines = self._engines.values()
        times = [at for e in engines for at in (e.restart_at, e.ready_by) if at is not None]
        if self._drain_until is not None:
            times.append(self._drain_until)
        return min(times, default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Advance by one event."""
        if self.state == "stopped":
            return []
        match event:
            case Started():
                starts = [self._start(model, now) for model in self.models]
                return [*starts, *self._open_doors()]
            case Want(model):
                return self._want(model, now)
            case Unwant(model):
                self._engines.pop(model, None)
                self._waiting_for.discard(model)
                return self._open_doors()
            case EngineReady(model):
                return self._engine_ready(model, now)
            case EngineExited(model):
                self._engine_exited(model, now)
                return self._open_doors()
            case DrainRequested(timeout_s):
                return self._drain(now + timeout_s)
            case StreamsLeft(count):
                return self._stop() if self.state == "draining" and count == 0 else []
            case Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    def _want(self, model: str, now: float) -> list[Effect]:
        if model in self._engines or self.state == "draining":
            return []
        self._engines[model] = _Engine()
        return [self._start(model, now)]

    def _start(self, model: str, now: float) -> StartEngine:
        self._engines[model].ready_by = now + READY_WITHIN_S
        return StartEngine(model)

    def _engine_ready(self, model: str, now: float) -> list[Effect]:
        engine = self._engines.get(model)
        if engine is None:
            return []
        engine.ready, engine.ready_since, engine.ready_by = True, now, None
        return self._open_doors()

    def _open_doors(self) -> list[Effect]:
        ready = {name for name, engine in self._engines.items() if engine.ready}
        failing = {
            name
            for name, engine in self._engines.items()
            if not engine.ready and engine.failures >= MAX_AWAITED_FAILURES
        }
        nobody_serves = bool(failing) and not ready
        if self.state != "starting" or nobody_serves or not self._waiting_for <= ready | failing:
            return []
        self.state = "serving"
        return [OpenDoors()]

    def _engine_exited(self, model: str, now: float) -> None:
        engine = self._engines.get(model)
        if engine is None:
            return  # it was not wanted any more
        if engine.ready and now - engine.ready_since >= STABLE_AFTER_S:
            engine.failures = 0
        engine.ready, engine.ready_by = False, None
        delay_s = min(RESTART_FIRST_S * 2**engine.failures, RESTART_MAX_S)
        engine.failures = min(engine.failures + 1, 16)
        if self.state != "draining":
            engine.restart_at = now + delay_s

    def _drain(self, until: float) -> list[Effect]:
        if self.state == "starting":
            return self._stop()
        if self.state == "draining":
            return []
        self.state, self._drain_until = "draining", until
        self._forget_restarts()
        return [AnnounceDrain()]

    def _stop(self) -> list[Effect]:
        self.state, self._drain_until = "stopped", None
        self._forget_restarts()
        return [Shutdown()]

    def _forget_restarts(self) -> None:
        """No engine is started or ended any more but by ``Shutdown``."""
        for engine in self._engines.values():
            engine.restart_at = engine.ready_by = None

    def _tick(self, now: float) -> list[Effect]:
        if self._drain_until is not None and now >= self._drain_until:
            return self._stop()
        effects: list[Effect] = []
        for model, engine in self._engines.items():
            if engine.restart_at is not None and now >= engine.restart_at:
                engine.restart_at = None
                effects.append(self._start(model, now))
            elif engine.ready_by is not None and now >= engine.ready_by:
                engine.ready_by = None
                effects.append(EndEngine(model))
        return effects
