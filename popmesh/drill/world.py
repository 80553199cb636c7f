"""What a drill sees of the mesh, who may be harmed in it, and when a victim is whole again. Pure.

A node is *ready* when every living router has its link up and every engine of it has produced a
token; a router is ready when it answers and sees every node that it should.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from popmesh.drill.faults import Order

RECOVERY_S = 180.0
"""Longest wait for a victim. Guess: a process starts and loads its model on a loaded machine, after
the longest pause between restarts (30 s)."""

NOTICE_S = 20.0
"""A killed engine that nobody has seen missing so long after its death was never noticed: agents
promise a second, the rest is for a machine that is busy."""

SETTLE_S = 1.0
"""After a fault that ends by itself: routers push and read loads once a second."""


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """One node; ``incarnation`` is new at every start of its agent."""

    name: str
    site: str
    roles: frozenset[str]
    models: frozenset[str]
    incarnation: str
    ready: bool


@dataclass(frozen=True, slots=True)
class RouterSeen:
    """One router, named by its URL; ``start`` is new at every start (0: not known)."""

    name: str
    start: int
    ready: bool


@dataclass(frozen=True, slots=True)
class MeshSeen:
    """All of it, at one look."""

    nodes: tuple[NodeSeen, ...]
    routers: tuple[RouterSeen, ...]


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """A link that can be broken; ``affected`` are the nodes that some router loses by it."""

    name: str
    affected: frozenset[str]


Nodes = Mapping[str, NodeSeen]


def may_lose(names: frozenset[str], nodes: Nodes, down: frozenset[str], max_down: int) -> bool:
    """May these nodes be harmed too, while ``down`` are out?

    No if more than ``max_down`` would be out, or a role of a model would have no whole node left.
    """
    if names & down or len(names | down) > max_down:
        return False
    if not all(name in nodes and nodes[name].ready for name in names):
        return False
    left = [node for name, node in nodes.items() if name not in names and name not in down]
    return all(
        any(role in other.roles and model in other.models for other in left if other.ready)
        for name in names
        for role in nodes[name].roles
        for model in nodes[name].models
    )


@dataclass(slots=True)
class Damage:
    """One order, from when it is given until its victim has healed."""

    order: Order
    affected: frozenset[str]
    before: Mapping[str, str | int]
    struck_at: float = math.inf
    until: float = math.inf
    seen_down: bool = False

    @classmethod
    def begin(cls, order: Order, affected: frozenset[str], mesh: MeshSeen) -> Damage:
        """Remember who was who before it happened."""
        before: dict[str, str | int] = {node.name: node.incarnation for node in mesh.nodes}
        before |= {router.name: router.start for router in mesh.routers}
        return cls(order, affected, before)

    def struck(self, now: float) -> None:
        """The order was carried out."""
        self.struck_at, self.until = now, now + self.order.fault.duration_s + RECOVERY_S

    def healed(self, mesh: MeshSeen, now: float) -> bool:
        """Is every victim back, and another one where it had to be started again?"""
        fault, victim = self.order.fault, self.order.victim
        if fault.target == "router":
            return any(
                router.ready and router.start != self.before.get(victim)
                for router in mesh.routers
                if router.name == victim
            )
        nodes = {node.name: node for node in mesh.nodes}
        ready = all(name in nodes and nodes[name].ready for name in self.affected)
        self.seen_down = self.seen_down or not ready
        if not ready:
            return False
        if fault.name == "kill-agent":
            return nodes[victim].incarnation != self.before.get(victim)
        if fault.name == "kill-engine":
            if not self.seen_down and now - self.struck_at >= NOTICE_S:
                self.until = now  # why_missing says so
            return self.seen_down
        return now - self.struck_at >= fault.duration_s + SETTLE_S

    def why_missing(self) -> str:
        """In words, once ``until`` has passed."""
        if self.order.fault.name == "kill-engine" and not self.seen_down:
            return f"no router noticed within {NOTICE_S:.0f} s that {self.order.victim} was hit"
        return f"{self.order.victim} was not whole again after {self.until - self.struck_at:.0f} s"
