"""Who failed one request, until when it is avoided, and which start of it that was.

Pure bookkeeping of one request: nothing here is shared between requests, so one client's trouble
never closes a node to others.
"""

from __future__ import annotations

from typing import NamedTuple

AVOID_S = 10.0
"""How long a node or pair that failed a request is avoided by it: two detection times, after which
whatever was wrong shows in the view. Guess."""

AVOID_ENGINE_S = 1.0
"""The same for a node whose engine died: by then a ``Load`` says whether it is ready. Source: loads
are pushed once a second at least."""


class NodeStart(NamedTuple):
    """One start of one node: a node that came back with another incarnation is another one."""

    name: str
    incarnation: str


class Pair(NamedTuple):
    """A hand-over from one node's start to another's."""

    prefill: NodeStart
    decode: NodeStart


class Avoidance:
    """Nodes and pairs with the time (router's clock, seconds) at which they are forgiven.

    Bounded by what a request tries within ``AVOID_S``: expired ones leave with every look.
    """

    def __init__(self) -> None:
        self._nodes: dict[NodeStart, float] = {}
        self._pairs: dict[Pair, float] = {}

    def add_node(self, node: NodeStart, until: float) -> None:
        """Avoid a node in this incarnation."""
        self._nodes[node] = until

    def add_pair(self, pair: Pair, until: float) -> None:
        """Avoid a hand-over between two nodes; either may still serve with another."""
        self._pairs[pair] = until

    def nodes(self, now: float) -> frozenset[NodeStart]:
        """Nodes to avoid now."""
        self._nodes = {node: until for node, until in self._nodes.items() if until > now}
        return frozenset(self._nodes)

    def pairs(self, now: float) -> frozenset[Pair]:
        """Pairs to avoid now."""
        self._pairs = {pair: until for pair, until in self._pairs.items() if until > now}
        return frozenset(self._pairs)
