"""What nodes were told to keep, and when to tell them again. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from router.placement.words import SayWarm
from router.routing.view import NodeView
from topology.model import Topology
from wire.messages import Warm

LEASE_S = 60.0
"""Longest lease that is asked for. It is all that a router which dies leaves behind, and how long a
node can be shut to other models after it is let go. Guess: many times what a load takes."""

RESAY = 3
"""A lease is said again when a third of it is over, so that two lost words do not end it."""


@dataclass(frozen=True, slots=True)
class _Lease:
    """The last word to a node about a model."""

    until: float
    incarnation: str


class Leases:
    """Times are seconds on the router's clock."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._said: dict[tuple[str, str], _Lease] = {}  # by model and node

    def renew(self, model: str, node: NodeView, until: float, now: float) -> list[SayWarm]:
        """A word to a node, if the last one to this start of it does not reach far enough.

        A node keeps what is pinned, and everything when it has no budget, without being told.
        """
        if node.phase != "up" or not node.memory_bytes:
            return []
        if model in self._topology.nodes[node.name].pinned:
            return []
        until = min(until, now + LEASE_S)
        last = self._said.get((model, node.name))
        is_news = last is None or last.incarnation != node.incarnation
        if last is not None and not is_news:
            ends_soon = last.until - now <= LEASE_S / RESAY and until > last.until
            if until - last.until < LEASE_S / RESAY and not ends_soon:
                return []
        self._said[model, node.name] = _Lease(until, node.incarnation)
        hold_ms = max(1, round((until - now) * 1e3))
        return [SayWarm(node.name, Warm(model, hold_ms), is_news)]

    def forget(self, now: float) -> None:
        """Drop what has run out."""
        self._said = {at: lease for at, lease in self._said.items() if lease.until > now}
