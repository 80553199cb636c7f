"""How a node's models are, in the words of routers and of the node's status. Changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from pop_node.hosting.model_host import ModelHost
from pop_node.legs.parking import Parking
from pop_node.residency.residency import Residency
from pop_node.residency.state import ModelState
from wire.messages import EngineLoad, ModelOffer, Warmth

_NOT_HERE = EngineLoad("", False, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 0)


class Standing:
    """Of the models of ``machine``; ``hosts`` has those that were ever on the disk. Used in the
    node's event loop."""

    def __init__(
        self,
        machine: Residency,
        hosts: Mapping[str, ModelHost],
        parking: Parking,
        budget_bytes: int | None,
    ) -> None:
        self._machine = machine
        self._hosts = hosts
        self._parking = parking
        self._budget = budget_bytes

    def state(self, model: str) -> ModelState:
        """What is known of a model; not to be changed."""
        return self._machine.state(model)

    def states(self) -> Mapping[str, ModelState]:
        """All of them by name; not to be changed."""
        return self._machine.models()

    def serves(self, model: str) -> bool:
        """Is this model in memory, and may legs come to it?"""
        state = self.state(model)
        return state.memory == "warm" and not state.barred and self._hosts[model].ready

    def warmth(self, model: str) -> Warmth:
        """Where the model is, in the words of the wire."""
        state = self.state(model)
        if self.serves(model):
            return "warm"
        if state.memory in ("queued", "loading", "warm") or state.again:
            return "loading"
        words: dict[str, Warmth] = {"absent": "absent", "fetching": "fetching", "here": "disk"}
        return words[state.disk]

    def is_asked_for(self, model: str) -> bool:
        """Does somebody want it, or is it to stay in memory anyway?"""
        state = self.state(model)
        return state.pinned or state.is_asked_for(asyncio.get_running_loop().time())

    def engine_pid(self, model: str) -> int | None:
        """Process id of the model's engine, if one runs."""
        host = self._hosts.get(model)
        return host.engine_pid if host is not None else None

    @property
    def num_legs(self) -> int:
        """Legs of all models in any stage, those included that wait for a model."""
        return sum(host.num_legs for host in self._hosts.values()) + len(self._parking)

    @property
    def memory_bytes(self) -> int:
        """The budget for models, 0 without one."""
        return self._budget or 0

    @property
    def memory_used_bytes(self) -> int:
        """What models take of it."""
        return self._machine.resident_bytes

    def offers(self) -> list[ModelOffer]:
        """What routers may ask for: every model that was ever on the disk."""
        offers = [host.facts.offer for host in self._hosts.values()]
        return [offer for offer in offers if offer is not None]

    def loads(self) -> list[EngineLoad]:
        """The load of every model, wherever it is."""
        now = asyncio.get_running_loop().time()
        return [self._load(name, now) for name in self.states()]

    def _load(self, model: str, now: float) -> EngineLoad:
        state, host = self.state(model), self._hosts.get(model)
        load = host.load() if host is not None else _NOT_HERE
        return msgspec.structs.replace(
            load,
            model=model,
            ready=load.ready and self.serves(model),
            waiting=load.waiting + self._parking.waiting_for(model),
            warmth=self.warmth(model),
            eta_ms=round(self._machine.eta_s(model, now) * 1000),
            memory_bytes=state.memory_bytes,
            warm_refused=self._machine.why_refused(model, now) or state.why_not_up,
            last_load_ms=round(state.last_load_s * 1000),
        )
