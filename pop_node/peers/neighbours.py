"""Which nodes may have a bundle, and how far they are: the registry's view and the topology.

The registry supplies addresses only; what a node is, the topology says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from registry.entries import ServiceEntry
from topology.geography import link_between
from topology.model import BYTES_PER_MBIT, Node, Topology
from wire.address import parse_address
from wire.errors import ConfigError

BUNDLES_SERVICE = "popmesh-bundles"
"""Nodes that give bundles register under this name as soon as they do: a node that starts may have
what its neighbour lacks long before it can answer anybody."""

BUNDLES_KEY = "bundles"
"""Key of such a registration's meta: ``host:port`` of the node's listener for takers."""

TYPICAL_BYTES = 16 * 1024 * 1024
"""Of a range when nearness is compared: for it 40 ms of distance weigh as much as a third of
1 Gbit/s."""


_HOST = re.compile(r"[A-Za-z0-9.:_%-]{1,253}")
"""Host names and addresses with their zones: what a registry says goes into requests."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A node to take from; ``typical_s``: how long a range of ``TYPICAL_BYTES`` should take."""

    name: str
    site: str
    address: str
    typical_s: float


def peers_of(
    entries: Iterable[ServiceEntry],
    topology: Topology,
    node: Node,
    rates: Mapping[str, float],
) -> list[Peer]:
    """All other nodes of the mesh that give bundles, the quickest first.

    ``rates``: bytes/s that peers were seen to give; for the others the link's bandwidth counts, as
    the topology says or estimates it. Entries that do not fit the topology are left out.
    """
    peers = []
    for entry in entries:
        name, address = entry.meta.get("name", ""), entry.meta.get(BUNDLES_KEY, "")
        known = topology.nodes.get(name)
        if known is None or name == node.name or entry.meta.get("mesh") != topology.mesh:
            continue
        if entry.status == "critical" or not _is_address(address):
            continue
        link = link_between(topology, node.site, known.site)
        assert link.rtt_ms is not None
        assert link.bandwidth_mbps is not None
        rate = rates.get(name, link.bandwidth_mbps * BYTES_PER_MBIT)
        peers.append(Peer(name, known.site, address, link.rtt_ms / 1000 + TYPICAL_BYTES / rate))
    return sorted(peers, key=lambda peer: (peer.typical_s, peer.name))


def _is_address(text: str) -> bool:
    try:
        host, _ = parse_address(text)
    except ConfigError:
        return False
    return _HOST.fullmatch(host) is not None
