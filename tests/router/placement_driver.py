"""A placement machine driven through a mesh whose every node may serve two models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from router.placement.machine import PlacementMachine
from router.placement.words import Asked, Decision, Looked, SayWarm
from router.routing.speeds import typical_speeds
from router.routing.view import NodeView, View
from tests.fakes.fake_node import idle_engine
from tests.router.router_mesh import make_topology
from tests.router.views import BOTH, node_view, offer
from topology.model import Model, Placement, Topology

GB = 10**9
A, B = "alpha", "beta"
RULES = Placement(warm_per_min=2.0, cool_after_s=300.0)


def topology_of(
    roles: dict[str, tuple[str, ...]], rules: Placement = RULES, **pinned: tuple[str, ...]
) -> Topology:
    """Every node may serve both models within 4 GB; each takes 3 GB."""
    made = make_topology(roles)
    nodes = {
        name: replace(
            node, models=(A, B), memory_gb=4.0, pinned=pinned.get(name.replace("-", "_"), ())
        )
        for name, node in made.nodes.items()
    }
    return replace(made, nodes=nodes, models={A: Model(A), B: Model(B)}, placement=rules)


TOPOLOGY = topology_of({"fra-1": BOTH, "lhr-1": BOTH, "iad-1": BOTH, "syd-1": BOTH})


def view_of(topology: Topology, **changes: dict[str, Any]) -> View:
    """All nodes up with both models on their disks, but for ``changes``; ``alpha`` and ``beta`` in
    them change the engines."""
    nodes: dict[str, NodeView] = {}
    for name in topology.nodes:
        changed = dict(changes.get(name.replace("-", "_"), {}))
        engines = {}
        for model in (A, B):
            engine = {"ready": False, "warmth": "disk", "eta_ms": 2000, "memory_bytes": 3 * GB}
            engine |= changed.pop(model, {})
            engine["ready"] = engine["warmth"] == "warm"
            engines[model] = idle_engine(model, **engine)
        used = sum(e.memory_bytes for e in engines.values() if e.warmth in ("warm", "loading"))
        known = replace(
            node_view(topology, name),
            version=3,
            rtt_ms=1.0,
            offers={model: offer(name=model) for model in (A, B)},
            engines=engines,
            memory_bytes=4 * GB,
            memory_used_bytes=used,
        )
        nodes[name] = replace(known, **changed)
    return View(topology, "fra", nodes, {}, typical_speeds(nodes.values()))


class Driver:
    """A placement machine with a clock; ``words`` are all it said, with the time."""

    def __init__(self, topology: Topology = TOPOLOGY) -> None:
        self.machine = PlacementMachine(topology)
        self.topology = topology
        self.view = view_of(topology)
        self.now = 0.0
        self.words: list[tuple[float, SayWarm]] = []

    def ask(self, model: str = A, site: str = "fra", times: int = 1, tokens: int = 10) -> None:
        for _ in range(times):
            assert self.machine.handle(Asked(model, site, tokens, tokens), self.now) == []

    def look(self) -> list[SayWarm]:
        words = self.machine.handle(Looked(self.view), self.now)
        self.words += [(self.now, word) for word in words]
        return words

    def run(self, seconds: float, ask_every: float = math.inf, **asked: Any) -> list[SayWarm]:
        """Let time pass, looking when the machine wants to."""
        said: list[SayWarm] = []
        end = self.now + seconds
        next_ask = math.inf if ask_every == math.inf else self.now
        while True:
            due = self.machine.next_deadline()
            at = min(end, next_ask, math.inf if due is None else due)
            if at >= end:
                self.now = end
                return said
            self.now = max(self.now, at)
            if self.now >= next_ask:
                self.ask(**asked)
                next_ask += ask_every
                due = self.machine.next_deadline()
            if due is not None and due <= self.now:
                said += self.look()

    def decision(self, model: str = A, region: str = "eu") -> Decision:
        return next(d for d in self.machine.decisions if (d.model, d.region) == (model, region))

    def nodes(self, model: str = A, region: str = "eu") -> tuple[str, ...]:
        return self.decision(model, region).nodes
