"""Whether what peers bring is worth waiting for: pure decisions, time is an argument."""

from __future__ import annotations

from collections.abc import Iterable

from topology.geography import link_between
from topology.model import BYTES_PER_MBIT, Node, Topology

PATIENCE_S = 30.0
"""Guess: how long too little may come, since all who have it are busy, before others are asked."""

SLOW_SHARE = 0.02
"""Of what peers could give: less is slow. Guess: an eighth of what a node gives that also answers
is three times as much."""


def least_bytes_per_s(topology: Topology, node: Node, givers: Iterable[str]) -> float:
    """What ``givers`` together should bring to ``node`` at least, while there is an origin too."""
    could_mbps = 0.0
    for name in givers:
        giver = topology.nodes[name]
        bandwidth_mbps = link_between(topology, node.site, giver.site).bandwidth_mbps
        assert bandwidth_mbps is not None
        could_mbps += min(giver.give_mbps, bandwidth_mbps)
    return could_mbps * BYTES_PER_MBIT * SLOW_SHARE


class Patience:
    """Ends when in ``PATIENCE_S`` fewer chunks came than should in it, or none."""

    def __init__(self, num_left: int, now: float) -> None:
        self._left = num_left
        self._since = now

    def is_over(self, num_left: int, least_per_s: float, now: float) -> bool:
        """``num_left`` chunks are missing; ``least_per_s`` of them should come in a second."""
        enough = max(1, int(least_per_s * PATIENCE_S))
        if self._left - num_left >= enough:
            self._left, self._since = num_left, now
        return now - self._since > PATIENCE_S
