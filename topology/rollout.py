"""How a model spreads over the mesh: who fetches it from whom, over which links, in what time.

Foretells what nodes do when all of them start with empty disks. The first disk in the file's order
fetches from the origin; then, one after the other, the disk that is nearest to a holder fetches
from the ``PEERS_AT_ONCE`` nearest holders, and becomes a holder itself. Times are those of a fetch
that has its links to itself: a plan, not a measurement. Pure arithmetic over ``topology.model``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from topology.geography import link_between
from topology.model import BYTES_PER_MBIT, Node, Topology

PEERS_AT_ONCE = 6
"""Peers that a node fetches one model from at the same time: more than fill any port, few enough to
stay near. Guess."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one peer gives: ``nbytes`` at ``mbps`` (10^6 bits a second), ``rtt_ms`` away."""

    giver: str
    site: str
    nbytes: int
    mbps: float
    rtt_ms: float


@dataclass(frozen=True, slots=True)
class Fetch:
    """How ``model`` comes to the disk of ``node``: in ``shares``, nearest peer first.

    Without shares it comes from the origin, and nobody knows how long that takes. ``seconds`` is
    one round trip to the nearest peer plus the bits over the rate of all shares together.
    """

    model: str
    node: str
    nbytes: int
    shares: tuple[Share, ...]
    seconds: float | None


@dataclass(frozen=True, slots=True)
class LinkUse:
    """Bytes between two sites in one direction, and how long they occupy the link alone."""

    giver: str
    taker: str
    nbytes: int
    seconds: float


class Paths:
    """What ``link_between`` says, remembered: a mesh of n nodes asks n² times."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._known: dict[tuple[str, str], tuple[float, float]] = {}

    def rtt_ms(self, a: str, b: str) -> float:
        """Between two sites."""
        return self._path(a, b)[0]

    def bandwidth_mbps(self, a: str, b: str) -> float:
        """Between two sites, in one direction."""
        return self._path(a, b)[1]

    def _path(self, a: str, b: str) -> tuple[float, float]:
        found = self._known.get((a, b))
        if found is None:
            link = link_between(self.topology, a, b)
            assert link.rtt_ms is not None  # link_between fills both in
            assert link.bandwidth_mbps is not None
            found = self._known[a, b] = self._known[b, a] = (link.rtt_ms, link.bandwidth_mbps)
        return found


def spread(paths: Paths, model: str, nbytes: int, disks: Sequence[Node]) -> list[Fetch]:
    """The fetches of one model of ``nbytes`` bytes, in order; ``disks`` has a node for each disk
    that is to have it, in the file's order."""
    if not disks:
        return []
    holders = [disks[0]]
    waiting = list(disks[1:])
    fetches = [Fetch(model, disks[0].name, nbytes, (), None)]
    # Distance of each waiting disk to its nearest holder: a new holder can only shorten it.
    reach = {node.name: paths.rtt_ms(node.site, holders[0].site) for node in waiting}
    while waiting:
        taker = min(waiting, key=lambda node: reach[node.name])  # ties: the file's order
        fetches.append(_fetch(paths, model, nbytes, taker, holders))
        waiting.remove(taker)
        holders.append(taker)
        for node in waiting:
            reach[node.name] = min(reach[node.name], paths.rtt_ms(node.site, taker.site))
    return fetches


def _fetch(paths: Paths, model: str, nbytes: int, taker: Node, holders: Sequence[Node]) -> Fetch:
    nearest = sorted(holders, key=lambda node: paths.rtt_ms(taker.site, node.site))[:PEERS_AT_ONCE]
    rates = _rates_mbps(paths, taker, nearest)
    total = sum(rates)
    shares: list[Share] = []
    done, reached = 0, 0.0
    for giver, mbps in zip(nearest, rates, strict=True):
        reached += mbps
        upto = nbytes if giver is nearest[-1] else min(nbytes, round(nbytes * (reached / total)))
        rtt_ms = paths.rtt_ms(taker.site, giver.site)
        shares.append(Share(giver.name, giver.site, upto - done, mbps, rtt_ms))
        done = upto
    seconds = shares[0].rtt_ms / 1e3 + nbytes / BYTES_PER_MBIT / total
    return Fetch(model, taker.name, nbytes, tuple(shares), seconds)


def _rates_mbps(paths: Paths, taker: Node, givers: Sequence[Node]) -> list[float]:
    """What each peer sends: its ``give_mbps``, or its part of a link that carries less than all of
    its site's givers together would send."""
    wanted: dict[str, float] = {}
    for giver in givers:
        wanted[giver.site] = wanted.get(giver.site, 0.0) + giver.give_mbps
    rates = []
    for giver in givers:
        carried = paths.bandwidth_mbps(taker.site, giver.site) / wanted[giver.site]
        rates.append(giver.give_mbps * min(1.0, carried))
    return rates


def link_use(paths: Paths, fetches: Iterable[Fetch]) -> list[LinkUse]:
    """What all fetches send over each link between sites, busiest (in seconds) first."""
    total: dict[tuple[str, str], int] = {}
    for fetch in fetches:
        taker = paths.topology.nodes[fetch.node].site
        for share in fetch.shares:
            if share.site != taker and share.nbytes:
                total[share.site, taker] = total.get((share.site, taker), 0) + share.nbytes
    uses = []
    for (giver, taker), nbytes in total.items():
        mbps = paths.bandwidth_mbps(giver, taker)
        uses.append(LinkUse(giver, taker, nbytes, nbytes / BYTES_PER_MBIT / mbps))
    return sorted(uses, key=lambda use: -use.seconds)
