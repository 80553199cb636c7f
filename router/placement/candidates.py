"""Which nodes of a region could keep a model in memory, the best first. Pure.

A node that is the least change comes first: where the model is kept already, then in memory, on its
way there, on the disk, on its way there, nowhere; of equals those that throw nothing out of memory,
can do both legs, and are near where the requests come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.routing.loading import is_cold
from router.routing.view import NodeView, View
from topology.geography import great_circle_km
from wire.messages import EngineLoad, Warmth

WARM_VERSION = 3
"""First version of the mesh wire that knows ``Warm``."""

_STEPS: dict[Warmth, int] = {"warm": 0, "loading": 1, "disk": 2, "fetching": 3, "absent": 4}
_WORDS: dict[Warmth, str] = {
    "warm": "has it in memory",
    "loading": "is loading it",
    "disk": "has it on its disk",
    "fetching": "is fetching it",
    "absent": "can fetch it",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that could keep the model in memory; ``need_bytes`` is what that takes of its budget,
    0 where the model is there anyway (pinned, or all models fit)."""

    node: NodeView
    engine: EngineLoad
    need_bytes: int
    is_held: bool
    distance_km: float

    @property
    def stays_anyway(self) -> bool:
        """Nobody has to ask for it."""
        return self.need_bytes == 0

    def order(self) -> tuple[bool, int, bool, int, float, str]:
        """The lower the better; see the module."""
        step, node = _STEPS[self.engine.warmth], self.node
        is_crowded = step > 1 and node.memory_used_bytes + self.need_bytes > node.memory_bytes > 0
        return (
            not self.is_held,
            step,
            is_crowded,
            -len(node.roles),
            self.distance_km,
            node.name,
        )

    def why(self) -> str:
        """The same in words."""
        node, parts = self.node, [f"{self.node.name} {_WORDS[self.engine.warmth]}"]
        if self.stays_anyway:
            parts.append("keeps it anyway")
        elif node.memory_bytes:
            free = max(0, node.memory_bytes - node.memory_used_bytes)
            parts.append(f"{_gb(free)} of {_gb(node.memory_bytes)} free")
        parts.append(f"{self.distance_km:.0f} km from the requests")
        return ", ".join(parts)


def look_for(
    view: View,
    model: str,
    region: str,
    asking: Mapping[str, float],
    held: frozenset[str],
    room: Mapping[str, int],
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Candidates in order, and the other nodes of the region with why they are none.

    ``asking`` weighs the sites that requests come from; ``room`` is what is left of each node's
    budget for models in bytes, where it has one.
    """
    found: list[Candidate] = []
    out: list[tuple[str, str]] = []
    for name, node in view.nodes.items():
        placed = view.topology.nodes[name]
        if node.region != region or model not in placed.models:
            continue
        engine = node.engines.get(model)
        why = _obstacle(node, engine, model, view)
        if why is not None or engine is None:
            out.append((name, why or "has said nothing of it yet"))
            continue
        stays = node.memory_bytes == 0 or model in placed.pinned
        need = 0 if stays else max(1, engine.memory_bytes)
        if need > room.get(name, need):
            out.append((name, f"{_gb(need)} do not fit in {_gb(max(0, room[name]))} beside others"))
            continue
        distance = _distance_km(view, node, asking)
        found.append(Candidate(node, engine, need, name in held, distance))
    return sorted(found, key=Candidate.order), out


def is_in_memory(view: View, node: str, model: str) -> bool:
    """The model is in the memory of this node."""
    engines = view.nodes[node].engines if node in view.nodes else {}
    return model in engines and engines[model].ready


def can_be_had(view: View, model: str) -> bool:
    """Some node has the model in memory, or could load it now."""
    for node in view.nodes.values():
        engine = node.engines.get(model)
        if engine is None or node.phase != "up" or node.draining:
            continue
        if engine.ready or (is_cold(node, model) and not engine.warm_refused):
            return True
    return False


def _obstacle(node: NodeView, engine: EngineLoad | None, model: str, view: View) -> str | None:
    if node.phase != "up":
        return "no link"
    if node.draining:
        return "draining"
    if engine is None:
        return "has said nothing of it yet"
    if node.version < WARM_VERSION or not engine.warmth:
        return f"speaks version {node.version} of the mesh wire, which knows no Warm"
    if engine.warm_refused:
        return f"cannot load it: {engine.warm_refused[:200]}"
    if node.offers_another(model, view.topology):
        return "has another model of that name than the topology pins"
    return None


def _distance_km(view: View, node: NodeView, asking: Mapping[str, float]) -> float:
    """Mean great circle to the asking sites, weighed by how much they ask."""
    sites, total = view.topology.sites, sum(asking.values())
    if total <= 0:
        return 0.0
    return (
        sum(
            weight * great_circle_km(sites[site].position, node.position)
            for site, weight in asking.items()
        )
        / total
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
