"""A topology as tables."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from popmesh.render.words import name_column
from topology.geography import link_between
from topology.model import Topology

MAX_LINKS = 40
"""Links shown: all pairs of nine sites; a larger mesh shows only those in its file."""


def site_table(mesh: Topology) -> Group:
    """Sites with their nodes, then the links between them."""
    sites = Table(
        *(name_column("Site"), "Region", name_column("Nodes"), name_column("Router")),
        title=f"Mesh {mesh.mesh}",
        title_justify="left",
    )
    for site in mesh.sites.values():
        nodes = [
            f"{node.name} ({', '.join(sorted(node.roles))})"
            for node in mesh.nodes.values()
            if node.site == site.name
        ]
        routers = [router.name for router in mesh.routers.values() if router.site == site.name]
        sites.add_row(
            f"{site.name} {site.city}".strip(), site.region, "\n".join(nodes), "\n".join(routers)
        )
    links = Table("Link", "RTT, ms", "Bandwidth, Mbit/s")
    names = list(mesh.sites)
    pairs = [frozenset((a, b)) for at, a in enumerate(names) for b in names[at + 1 :]]
    if len(pairs) > MAX_LINKS:
        pairs = list(mesh.links)
    for pair in pairs:
        a, b = sorted(pair, key=names.index)
        given, link = mesh.links.get(pair), link_between(mesh, a, b)
        rtt = "" if given and given.rtt_ms is not None else "~"
        rate = "" if given and given.bandwidth_mbps is not None else "~"
        links.add_row(f"{a} - {b}", f"{rtt}{link.rtt_ms:.1f}", f"{rate}{link.bandwidth_mbps:.0f}")
    return Group(sites, links)
