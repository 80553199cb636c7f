"""The shell around ``plan.Conductor``: feeds it, carries its orders out, keeps the ledger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import assert_never

from popmesh.drill import plan
from popmesh.drill.drivers import STRIKE_S, FaultDriver, LocalDriver
from popmesh.drill.faults import Order
from popmesh.drill.ledger import Ledger
from popmesh.drill.world import MeshSeen
from wire.errors import ConfigError, MeshError

MAX_EVENTS = 1024
"""Waiting for the conductor, which takes microseconds for each. Beyond it, what streams say is
dropped: it only helps to aim."""

MAX_REFUSALS = 5
"""Orders in a row that nobody carries out: then the drill cannot be held. One alone is an engine
that just died by itself, or a node that just left."""


class Striker:
    """Holds one drill's faults. ``now`` is the drill's clock, ``say`` tells a person."""

    def __init__(
        self,
        conductor: plan.Conductor,
        nodes: FaultDriver,
        local: LocalDriver | None,
        ledger: Ledger,
        now: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._conductor = conductor
        self._nodes = nodes
        self._local = local
        self._ledger = ledger
        self._now = now
        self._say = say
        self._refusals = 0  # in a row
        self._events: asyncio.Queue[plan.Event] = asyncio.Queue(MAX_EVENTS)

    def notice(self, event: MeshSeen | plan.StreamAt) -> None:
        """The mesh, or a stream, is like this now."""
        with contextlib.suppress(asyncio.QueueFull):
            self._events.put_nowait(event)

    async def run(self, duration_s: float) -> None:
        """Strike until ``duration_s`` are over or there were enough faults, then wait for the last
        victims."""
        stop_at = self._now() + duration_s
        stopped = False
        async with asyncio.TaskGroup() as tasks:
            while not self._conductor.done:
                event = await self._next_event(None if stopped else stop_at)
                effects = self._conductor.handle(event, self._now())
                if not stopped and self._now() >= stop_at:
                    stopped = True
                    effects += self._conductor.handle(plan.Stop(), self._now())
                for effect in effects:
                    self._carry_out(effect, tasks)

    async def _next_event(self, stop_at: float | None) -> plan.Event:
        times = [at for at in (self._conductor.next_deadline(), stop_at) if at is not None]
        wait_s = max(min(times) - self._now(), 0.0) if times else None
        try:
            async with asyncio.timeout(wait_s):
                return await self._events.get()
        except TimeoutError:
            return plan.Tick()

    def _carry_out(self, effect: plan.Effect, tasks: asyncio.TaskGroup) -> None:
        match effect:
            case plan.Strike(order):
                self._ledger.ordered(order, self._now())
                tasks.create_task(self._strike(order))
            case plan.Recovered(number, after_s):
                self._ledger.recovered(number, after_s)
                self._say(f"  {number}: whole again after {after_s:.1f} s")
            case plan.Missing(number, reason):
                self._ledger.missing(number, reason)
                self._say(f"  {number}: {reason}; no more faults")
            case _:
                assert_never(effect)

    async def _strike(self, order: Order) -> None:
        name, number = order.fault.name, order.number
        aim = "" if order.stage == "any" else f", {order.stage}"
        self._say(f"{self._now():7.1f} s  {number}: {name} of {order.victim}{aim}")
        try:
            async with asyncio.timeout(STRIKE_S):
                await self._driver(order).strike(order)
        except (MeshError, TimeoutError) as exc:
            why = str(exc) or f"not taken within {STRIKE_S:.0f} s"
            self._ledger.refused(number, why)
            self._say(f"  {number}: not done: {why}")
            self._refusals += 1
            if self._refusals >= MAX_REFUSALS:
                raise ConfigError(f"this mesh refuses to be drilled: {why}") from exc
            await self._events.put(plan.Refused(number))
            return
        self._refusals = 0
        await self._events.put(plan.Struck(number))
        if order.fault.target == "link" and order.fault.duration_s and self._local is not None:
            try:
                await asyncio.sleep(order.fault.duration_s)
            finally:  # an interrupted drill leaves no broken link behind
                await self._local.repair(order)

    def _driver(self, order: Order) -> FaultDriver:
        if order.fault.target == "node":
            return self._nodes
        if self._local is None:
            raise ConfigError(f"{order.fault.name} needs --local")
        return self._local
