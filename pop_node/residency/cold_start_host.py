"""What a cold-start drill may do with this node's models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from pop_node.drills.report import Source
from pop_node.engine.start_clock import Span
from pop_node.residency import events as ev
from pop_node.residency.residents import Residents
from wire.errors import ConfigError, PeerError

LEGS_END_S = 30.0
"""How long legs may go on when their model is taken down; as long as a draining node lets them."""


class ResidentColdStarts:
    """``pop_node.drills.cold_start.ColdStartHost`` of a node's residents."""

    def __init__(self, name: str, residents: Residents, is_serving: Callable[[], bool]) -> None:
        self._name = name
        self._residents = residents
        self._is_serving = is_serving

    @property
    def name(self) -> str:
        """The node's name."""
        return self._name

    def problem(self, model: str) -> str:
        """Why this model cannot be taken down now, or nothing."""
        if model not in self._residents.standing.states():
            return f"node {self._name} does not serve {model[:64]!r}"
        if not self._is_serving():
            return "the node is starting or draining"
        if not self._residents.standing.serves(model):
            return f"{model} is not in memory: {self._residents.standing.warmth(model)}"
        return ""

    def bundle_path(self, model: str) -> Path:
        """The directory of its bundle. Raises ``ConfigError`` when it is not on the disk."""
        if self._residents.standing.state(model).disk != "here":
            raise ConfigError(f"{model} is not on this node's disk")
        return self._residents.hosts[model].settings.engine.model_dir

    def engine_pid(self, model: str) -> int | None:
        """The process that has the model in memory, if one does."""
        return self._residents.standing.engine_pid(model)

    async def take_down(self, model: str) -> None:
        """Say "not ready", let its legs end for ``LEGS_END_S``, then end its process and one that
        stands by. Nobody starts it before ``start``."""
        residents = self._residents
        residents.feed(ev.TakeDown(model))
        try:
            async with asyncio.timeout(LEGS_END_S):
                await residents.until(lambda: residents.standing.state(model).memory == "out")
        except TimeoutError:
            residents.feed(ev.Legs(model, 0))  # they end with the engine
            await residents.until(lambda: residents.standing.state(model).memory == "out")
        await residents.drop_standby()

    async def start(self, model: str, source: Source) -> Sequence[Span]:
        """Start it in a new process and wait until it has produced a token.

        Raises ``MeshError`` when it does not come up; it is tried on then, as after any crash.
        """
        residents = self._residents
        fetched: list[Span] = []
        if source != "disk":
            took_s, nbytes = await residents.fetching.again(model, source)
            fetched.append(("fetch", 0.0, took_s, nbytes))
        residents.feed(ev.BringBack(model))
        state = residents.standing.state(model)
        await residents.until(lambda: state.memory == "warm" or state.failures > 0)
        if state.memory != "warm":
            raise PeerError(state.problem, code="drill_failed")
        fetched_s = sum(end_s for _, _, end_s, _ in fetched)  # the process was started then
        phases = residents.hosts[model].phases
        later = [(name, a + fetched_s, b + fetched_s, size) for name, a, b, size in phases]
        return [*fetched, *later]
