"""Which models have a place in memory, were promised one, or are leaving theirs. Pure.

Memory is *committed* when a model is promised its place and *resident* while an engine has it;
neither is ever beyond the budget. Every model that is queued comes in as soon as those that make
room are gone, and nobody overtakes it for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pop_node.residency import events as ev
from pop_node.residency.room import committed_bytes, find_room, why_not
from pop_node.residency.state import ModelState


class Places:
    """Of all ``models`` of a node; ``budget_bytes`` None: no bound."""

    def __init__(self, models: Mapping[str, ModelState], budget_bytes: int | None) -> None:
        self._models = models
        self._budget = budget_bytes
        self._queue: list[str] = []  # promised a place, waiting for others to leave it
        self.load_bytes_per_s = 0.0  # measured on this node; 0: not yet

    @property
    def committed_bytes(self) -> int:
        """Memory of models that have a place or were promised one."""
        return committed_bytes(self._models.values())

    @property
    def resident_bytes(self) -> int:
        """Memory of models that have an engine."""
        return sum(m.memory_bytes for m in self._models.values() if m.is_resident)

    def refusal(self, model: ModelState, now: float) -> ev.Refuse | None:
        """Why the model cannot come now; None when it can, or is there."""
        return why_not(self._models.values(), model, self._budget, now, self.load_bytes_per_s)

    def room(self, model: ModelState, now: float) -> list[ModelState] | None:
        """Who has to leave for the model; None when that is not enough."""
        return find_room(self._models.values(), model, self._budget, now)

    def make_room(
        self, model: ModelState, victims: list[ModelState], now: float
    ) -> list[ev.Effect]:
        """Promise the model the place that ``victims`` leave."""
        effects: list[ev.Effect] = []
        for victim in victims:
            effects += self.leave(victim)
        if model.memory == "leaving":
            model.again = True
        else:
            self.promise(model)
        return effects + self.admit(now)

    def promise(self, model: ModelState) -> None:
        """Its place is its own as soon as it is free; ``admit`` sees to that."""
        model.memory = "queued"
        self._queue.append(model.name)

    def admit(self, now: float) -> list[ev.Effect]:
        """Load those that were promised a place, in order, as far as it is free by now."""
        effects: list[ev.Effect] = []
        for name in list(self._queue):
            model = self._models[name]
            free = math.inf if self._budget is None else self._budget - self.resident_bytes
            if model.memory_bytes <= free:
                self._queue.remove(name)
                model.memory, model.since = "loading", now
                effects.append(ev.Load(name))
        return effects

    def leave(self, model: ModelState) -> list[ev.Effect]:
        """Its engine is to end; ``left`` when it has."""
        model.memory = "leaving"
        return [ev.Unload(model.name)]

    def left(self, model: ModelState, now: float) -> list[ev.Effect]:
        """Its engine is gone: who waited for the place comes in, perhaps the model itself."""
        if model.memory != "leaving":
            return []
        model.memory = "out"
        if model.again:
            model.again = False
            self.promise(model)
        return self.admit(now)

    def take_back(self, model: ModelState) -> list[ev.Effect]:
        """Out of memory, or of the queue to it."""
        if model.name in self._queue:
            self._queue.remove(model.name)
            model.memory = "out"
        model.again = False
        return self.leave(model) if model.memory in ("loading", "warm") else []

    def bring_back(self, model: ModelState, now: float) -> list[ev.Effect]:
        """Its place was kept while it was out, so nobody has to leave."""
        if model.is_loadable and model.memory == "leaving":
            model.again = True
        elif model.is_loadable and model.memory == "out":
            self.promise(model)
        return self.admit(now)
