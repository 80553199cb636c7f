"""The clients of a drill: what they ask undisturbed, to compare with, and then all the time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from popmesh.drill.check import judge
from popmesh.drill.ledger import Answers
from popmesh.drill.local import LocalMesh
from popmesh.drill.look import Lookout, Route
from popmesh.drill.observation import Observation
from popmesh.drill.report import AskRow, ask_row
from popmesh.drill.stream import Caller, Watch, session
from popmesh.drill.workload import Ask, make_asks
from wire.errors import PeerError

ASKS = 32
"""Different requests: few enough to ask them all beforehand, enough to outgrow a small cache."""

REFERENCES_AT_ONCE = 4
"""Guess: a batch, but no queue."""

CALM_ROUNDS = 2
"""Answers of each client before the first fault: connections are made, buffers have grown."""

UNLUCKY_PAUSE_S = 0.5
"""A client whose request was refused asks again, but does not storm."""


@dataclass(frozen=True, slots=True)
class CrowdConfig:
    """What the operator asked of the clients; times in seconds. ``exact``: an answer must equal its
    reference."""

    urls: tuple[str, ...]
    api_key: str | None
    operator_key: str | None
    model: str
    streams: int
    deadline_s: float
    seed: int
    exact: bool


class Crowd:
    """The clients of one drill, and its clock; ``say`` tells a person what they do. ``references``
    are the answers without any fault, by the number of their request. Used inside a running loop.
    """

    def __init__(self, config: CrowdConfig, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._asks = make_asks(ASKS, random.Random(f"asks {config.seed}"))
        self.references: dict[int, Observation] = {}
        self.is_closing = False

    def now(self) -> float:
        """Seconds since the drill began."""
        return self._loop.time() - self._began

    @asynccontextmanager
    async def connected(
        self, local: LocalMesh | None, watch: Watch
    ) -> AsyncIterator[tuple[Caller, Lookout]]:
        """Who asks the mesh, and who looks at it; ``watch`` hears what stages streams reach."""
        config = self._config
        key = config.operator_key or config.api_key
        async with (
            session(config.api_key, config.streams) as http,
            Lookout(config.urls, key, config.model, local) as lookout,
        ):
            caller = Caller(http, config.urls, config.model, config.deadline_s, self.now, watch)
            yield caller, lookout

    async def ask_undisturbed(self, caller: Caller) -> Answers:
        """Fill ``references``, then what all clients at a time see without any fault; raises
        ``PeerError`` when a reference fails."""
        self._say(f"Asking {len(self._asks)} requests undisturbed, to compare with.")
        gate = asyncio.Semaphore(REFERENCES_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            for ask in self._asks:
                tasks.create_task(self._reference(ask, caller, gate))
        self._say(f"Asking undisturbed, {self._config.streams} at a time.")
        calm = Answers()
        async with asyncio.TaskGroup() as tasks:
            for number in range(self._config.streams):
                tasks.create_task(self._calm(number, caller, calm))
        return calm

    async def keep_asking(
        self,
        number: int,
        caller: Caller,
        lookout: Lookout,
        answered: Callable[[Observation, list[Route]], None],
    ) -> None:
        """Be client ``number`` until the drill closes; ``answered`` takes every answer, with the
        routes of its attempts."""
        rng = random.Random(f"client {self._config.seed} {number}")
        while not self.is_closing:
            seen = await caller.ask(rng.choice(self._asks), number)
            routes = await lookout.routes(seen.url, seen.request_id)
            seen.attempts = len(routes)
            answered(seen, routes)
            if not seen.complete:
                await asyncio.sleep(UNLUCKY_PAUSE_S)

    def rows(self) -> list[AskRow]:
        """The requests, for a report."""
        return [ask_row(ask, self.references[ask.number]) for ask in self._asks]

    async def _reference(self, ask: Ask, caller: Caller, gate: asyncio.Semaphore) -> None:
        async with gate:
            seen = await caller.ask(ask, ask.number)
        if not seen.complete:
            code, message = seen.error or ("peer_failed", "it ended without its end")
            raise PeerError(f"an undisturbed request failed: {message}", code=code)
        self.references[ask.number] = seen

    async def _calm(self, number: int, caller: Caller, calm: Answers) -> None:
        rng = random.Random(f"calm {self._config.seed} {number}")
        for _ in range(CALM_ROUNDS):
            seen = await caller.ask(rng.choice(self._asks), number)
            calm.add(seen, judge(seen, self.references[seen.ask.number], ()), None)
