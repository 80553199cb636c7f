"""Runs a ``Watch``: asks the registry, keeps the view, tells who wants to know."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from registry.client import Registry
from registry.entries import Snapshot
from registry.watch import Answered, Event, Failed, Publish, Query, Stale, Start, Tick, Watch
from wire.errors import PeerError

log = logging.getLogger(__name__)


class Watcher:
    """The current view of one service, kept up to date while ``run`` runs.

    Keeps serving the last view when the registry is away. ``on_change`` is called in the loop with
    every view that differs from the one before.
    """

    def __init__(
        self,
        registry: Registry,
        service: str,
        on_change: Callable[[Snapshot], None],
        *,
        rng: random.Random | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._registry = registry
        self._service = service
        self._on_change = on_change
        self._rng = rng or random.Random()
        self._watch = watch or Watch()
        self._failing = False

    @property
    def snapshot(self) -> Snapshot | None:
        """The last view; None before the registry's first answer."""
        return self._watch.view

    @property
    def age_s(self) -> float | None:
        """Seconds since the registry last confirmed the view; None before its first answer.

        A healthy watch is confirmed at least once per blocking query.
        """
        return self._watch.age_s(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            asking: asyncio.Task[Event] | None = None
            event: Event = Start()
            while True:
                for effect in self._watch.handle(event, loop.time()):
                    match effect:
                        case Query():
                            asking = group.create_task(self._ask(effect))
                        case Publish(snapshot):
                            self._on_change(snapshot)
                        case Stale(age_s):
                            self._note_failure(age_s)
                deadline = self._watch.next_deadline()
                timeout = None if deadline is None else max(0.0, deadline - loop.time())
                if asking is None:
                    await asyncio.sleep(timeout or 0.0)
                else:
                    await asyncio.wait({asking}, timeout=timeout)
                event = Tick()
                if asking is not None and asking.done():
                    event, asking = asking.result(), None

    async def _ask(self, query: Query) -> Event:
        try:
            snapshot = await self._registry.services(
                self._service, wait_index=query.index, wait_s=query.wait_s
            )
        except PeerError as exc:
            if not self._failing:
                log.warning("watch of %s lost its registry: %s", self._service, exc)
            return Failed(self._rng.random())
        if self._failing:
            log.info("watch of %s is back", self._service)
            self._failing = False
        return Answered(snapshot)

    def _note_failure(self, age_s: float | None) -> None:
        self._failing = True
        log.debug(
            "view of %s is %s s old", self._service, "?" if age_s is None else round(age_s, 1)
        )
