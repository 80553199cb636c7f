"""Who is harmed next: bounds first, then what was asked for, then whoever was spared so far. Pure
but for the randomness, which is an argument."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import assert_never

from popmesh.drill.faults import Order, Target
from popmesh.drill.world import LinkSeen, MeshSeen, Nodes, may_lose


class Victims:
    """Keeps count of who is out and who was harmed how often."""

    def __init__(
        self,
        links: Sequence[LinkSeen],
        max_down: int,
        rng: random.Random,
        spared: frozenset[str] = frozenset(),
    ) -> None:
        self._links = {link.name: link for link in links}
        self._max_down = max_down
        self._rng = rng
        self._spared = spared
        self._harmed: dict[str, int] = {}
        self._out: dict[int, frozenset[str]] = {}
        self.mesh = MeshSeen((), ())

    def affected(self, victim: str) -> frozenset[str]:
        """Whom harm to ``victim`` puts out."""
        link = self._links.get(victim)
        return frozenset((victim,)) if link is None else link.affected

    def take(self, order: Order) -> None:
        """It is being harmed: it is out until ``release``."""
        self._harmed[order.victim] = self._harmed.get(order.victim, 0) + 1
        self._out[order.number] = self.affected(order.victim)

    def release(self, number: int) -> None:
        """The victim of this order is back."""
        del self._out[number]

    def may_harm(self, name: str, target: Target) -> bool:
        """Within the bounds? Nodes that take no part may still lose a link."""
        if target == "node" and name in self._spared:
            return False
        down, nodes = self._down(), self._nodes()
        if target == "router":
            ready = {router.name for router in self.mesh.routers if router.ready} - down
            return name in ready and len(ready) > 1 and len(down) < self._max_down
        affected = self.affected(name)
        return bool(affected) and may_lose(affected, nodes, down, self._max_down)

    def pick(self, target: Target, role: str | None) -> str | None:
        """The least harmed of those who may be harmed; with ``role`` if somebody has it."""
        names: Iterable[str]
        match target:
            case "node":
                nodes = self._nodes()
                names = [name for name in nodes if self.may_harm(name, target)]
                names = [name for name in names if role in nodes[name].roles] or names
            case "router":
                names = [router.name for router in self.mesh.routers]
            case "link":
                names = self._links
            case _:
                assert_never(target)
        return self.least_harmed([name for name in names if self.may_harm(name, target)])

    def least_harmed(self, names: Sequence[str]) -> str | None:
        """One of those harmed least often."""
        if not names:
            return None
        least = min(self._harmed.get(name, 0) for name in names)
        return self._rng.choice([name for name in names if self._harmed.get(name, 0) == least])

    def _nodes(self) -> Nodes:
        return {node.name: node for node in self.mesh.nodes}

    def _down(self) -> frozenset[str]:
        """Nodes that are out, about to be, or not back; routers that were harmed."""
        down = {node.name for node in self.mesh.nodes if not node.ready}
        return frozenset(down.union(*self._out.values()))
