"""What looks at routers say of a site that was lost: noticed, whole again, how much is left. Pure.

Fed with the statuses of all routers, again and again, on the drill's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from popmesh.drill.eyes import Statuses
from popmesh.drill.world import MeshSeen


@dataclass(frozen=True, slots=True)
class Capacity:
    """Nodes that can answer for the model, and room for tokens in their caches."""

    nodes_ready: int = 0
    kv_tokens: int = 0


@dataclass(slots=True)
class SiteWatch:
    """``nodes`` are the site's, ``before`` their incarnations when they were struck."""

    model: str
    nodes: Sequence[str]
    before: Mapping[str, str] = field(default_factory=dict)
    noticed_at: float | None = None
    whole_at: float | None = None
    capacity: Capacity = Capacity()

    def struck(self, mesh: MeshSeen) -> None:
        """The blow falls now; ``mesh`` is the last look before it."""
        self.before = {node.name: node.incarnation for node in mesh.nodes}

    def look(self, statuses: Statuses, mesh: MeshSeen, now: float) -> None:
        """How things are; before the blow only the capacity counts."""
        answering = [status for status in statuses.values() if status is not None]
        if answering:
            self.capacity = capacity(answering[0], self.model)
        if not self.before:
            return
        if self.noticed_at is None:
            if answering and not any(self._linked(status) for status in answering):
                self.noticed_at = now
        elif self.whole_at is None and self.reborn(mesh) >= set(self.nodes):
            self.whole_at = now

    def reborn(self, mesh: MeshSeen) -> set[str]:
        """Nodes of the site that were started anew and that every router sees ready."""
        return {
            node.name
            for node in mesh.nodes
            if node.name in self.nodes
            and node.ready
            and node.incarnation != self.before.get(node.name)
        }

    def _linked(self, status: Mapping[str, Any]) -> bool:
        """Has this router a link to any of them that is older than the blow?"""
        return any(
            said["name"] in self.nodes
            and said["link"] == "up"
            and said["incarnation"] == self.before.get(said["name"])
            for said in status["nodes"]
        )


def capacity(status: Mapping[str, Any], model: str) -> Capacity:
    """Of one router's status."""
    nodes = kv_tokens = 0
    for said in status["nodes"]:
        block_tokens = {offer["name"]: offer.get("block_tokens", 1) for offer in said["models"]}
        for engine in said["engines"]:
            if engine["model"] == model and engine["ready"] and said["link"] == "up":
                nodes += 1
                kv_tokens += engine["total_blocks"] * block_tokens.get(model, 1)
    return Capacity(nodes, kv_tokens)
