"""When to do which harm to whom. A pure machine: the clock and the randomness are arguments.

    resting --pause over--> aiming --a stream is at the stage--> struck --victim whole--> resting

A fault is drawn from a shuffled deck, so that kinds come equally often, and so is the stage at
which it should hit. While aiming, the first stream that reaches the stage on a node that may be
harmed names the victim; if none does in time, the least harmed node is taken. Nobody is harmed who
would leave more than ``max_down`` nodes out, or a role of a model without a whole node, or the mesh
without a router; the next fault waits until the victim is whole again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, assert_never

from popmesh.drill.faults import STAGES, Fault, Order, Stage
from popmesh.drill.victims import Victims
from popmesh.drill.world import Damage, LinkSeen, MeshSeen

AIM_S = 2.0
"""How long a stage is waited for. Guess: several answers begin in it at any useful load."""

RETRY_S = 0.5
"""Pause after there was nobody whom one may harm: a few looks at the mesh."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator asked for.

    ``every_s`` is the mean pause between a recovery and the next fault; ``kills`` None: until
    stopped. ``ttft_s`` is a usual time to the first token. ``spared``: nodes that take no part.
    """

    faults: tuple[Fault, ...]
    every_s: float
    max_down: int
    kills: int | None
    ttft_s: float
    links: tuple[LinkSeen, ...] = ()
    spared: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class StreamAt:
    """A client's stream is at ``stage`` now, served by ``nodes`` (empty: not known yet)."""

    stage: Stage
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Struck:
    """The order was carried out."""

    number: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The order could not be carried out."""

    number: int


@dataclass(frozen=True, slots=True)
class Stop:
    """No more harm from now on."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The deadline has come."""


Event = MeshSeen | StreamAt | Struck | Refused | Stop | Tick


@dataclass(frozen=True, slots=True)
class Strike:
    """Carry out this order, and say ``Struck`` or ``Refused``."""

    order: Order


@dataclass(frozen=True, slots=True)
class Recovered:
    """The victim is whole again, ``after_s`` after it was struck."""

    number: int
    after_s: float


@dataclass(frozen=True, slots=True)
class Missing:
    """The victim did not come back in time: a mesh that does not heal is left in peace."""

    number: int
    reason: str


Effect = Strike | Recovered | Missing


@dataclass(slots=True)
class _Aim:
    """``fire_at`` None: still waiting for a stream, until ``until``."""

    fault: Fault
    stage: Stage
    until: float
    fire_at: float | None = None
    target: str | None = None


class Conductor:
    """The machine; see the module."""

    def __init__(self, settings: Settings, rng: random.Random, now: float) -> None:
        self._settings = settings
        self._rng = rng
        self._victims = Victims(settings.links, settings.max_down, rng, settings.spared)
        self._faults: list[Fault] = []
        self._stages: list[Stage] = []
        self._aim: _Aim | None = None
        self._ordered: dict[int, Damage] = {}
        self._damage: dict[int, Damage] = {}
        self._number = 0  # of the last order
        self._kills = 0
        self._stopped = False
        self._next_at: float | None = now + self._pause_s()

    @property
    def done(self) -> bool:
        """Every fault that will be was, and no victim is waited for."""
        return self._enough() and not self._ordered and not self._damage

    def next_deadline(self) -> float | None:
        """When to send ``Tick``."""
        times = [damage.until for damage in self._damage.values()]
        if self._aim is not None:
            times.append(self._aim.until if self._aim.fire_at is None else self._aim.fire_at)
        elif self._next_at is not None:
            times.append(self._next_at)
        return min(times, default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Advance by one event."""
        effects: list[Effect] = []
        match event:
            case MeshSeen():
                self._victims.mesh = event
                effects += self._look(event, now)
            case StreamAt():
                self._stream_at(event, now)
            case Struck(number):
                damage = self._damage[number] = self._ordered.pop(number)
                damage.struck(now)
                self._kills += 1
            case Refused(number):
                del self._ordered[number]
                self._victims.release(number)
            case Stop():
                self._stopped, self._aim, self._next_at = True, None, None
            case Tick():
                pass
            case _:
                assert_never(event)
        return effects + self._expire(now) + self._advance(now)

    # ---- the next fault ------------------------------------------------------------------------

    def _enough(self) -> bool:
        wanted = self._settings.kills
        enough = wanted is not None and self._kills + len(self._ordered) >= wanted
        return self._stopped or enough

    def _advance(self, now: float) -> list[Effect]:
        """Rest, begin to aim, or strike."""
        if self._enough():
            self._aim = self._next_at = None
            return []
        if self._aim is None:
            if self._next_at is None and self._may_go_on():
                self._next_at = now + self._pause_s()
            if self._next_at is None or now < self._next_at:
                return []
            self._begin(now)
        aim = self._aim
        assert aim is not None
        if aim.fire_at is not None and now >= aim.fire_at:
            return self._strike(aim, aim.stage, now)
        if aim.fire_at is None and now >= aim.until:
            return self._strike(aim, "any", now)
        return []

    def _may_go_on(self) -> bool:
        return len(self._ordered) + len(self._damage) < self._settings.max_down

    def _pause_s(self) -> float:
        """Around the mean, so that faults keep no step with anything periodic."""
        return self._settings.every_s * self._rng.uniform(0.5, 1.5)

    def _begin(self, now: float) -> None:
        self._next_at = None
        fault = _deal(self._faults, self._settings.faults, self._rng)
        if fault.target == "node":
            self._aim = _Aim(fault, _deal(self._stages, STAGES, self._rng), now + AIM_S)
        else:  # routers and links carry streams of every stage at once
            self._aim = _Aim(fault, "any", now, fire_at=now)

    def _stream_at(self, seen: StreamAt, now: float) -> None:
        aim = self._aim
        if aim is None or aim.fire_at is not None or seen.stage != aim.stage:
            return
        if seen.stage == "before-first-token":  # somewhere on the way to the first token
            aim.fire_at = now + self._rng.uniform(0.0, self._settings.ttft_s)
            return
        victims = [name for name in seen.nodes if self._victims.may_harm(name, "node")]
        aim.target = self._victims.least_harmed(victims)
        if aim.target is not None:
            aim.fire_at = now

    def _strike(self, aim: _Aim, stage: Stage, now: float) -> list[Effect]:
        self._aim = None
        victim = aim.target
        if victim is None:
            role = "prefill" if stage == "before-first-token" else None
            victim = self._victims.pick(aim.fault.target, role)
        if victim is None:
            self._next_at = now + RETRY_S
            return []
        self._number += 1
        order = Order(self._number, aim.fault, victim, stage)
        affected = self._victims.affected(victim)
        self._ordered[order.number] = Damage.begin(order, affected, self._victims.mesh)
        self._victims.take(order)
        return [Strike(order)]

    # ---- afterwards ----------------------------------------------------------------------------

    def _look(self, mesh: MeshSeen, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for number, damage in list(self._damage.items()):
            if damage.healed(mesh, now):
                del self._damage[number]
                self._victims.release(number)
                effects.append(Recovered(number, now - damage.struck_at))
        return effects

    def _expire(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for number, damage in list(self._damage.items()):
            if now >= damage.until:
                del self._damage[number]  # its victim stays out: nobody knows how it is
                self._stopped = True
                effects.append(Missing(number, damage.why_missing()))
        return effects


def _deal(deck: list[T], cards: Sequence[T], rng: random.Random) -> T:
    """The next card; an empty deck is filled and shuffled."""
    if not deck:
        deck.extend(cards)
        rng.shuffle(deck)
    return deck.pop()
