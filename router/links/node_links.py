"""The router's links, following the directory: the nearest nodes each have one.

The directory supplies addresses only. A node counts when the topology knows it; a node whose link
is up stays in use even when the directory forgets it (a restarted registry starts empty, and a node
that really leaves says so on the link).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable

from registry.entries import ServiceEntry
from router.links.link_words import LinkEvents, LinkIdentity
from router.links.node_link import NodeLink
from router.routing.view_builder import ViewBuilder
from topology.geography import great_circle_km
from topology.model import Topology
from wire.errors import MeshError
from wire.messages import Hello

log = logging.getLogger(__name__)

SERVICE = "popmesh-node"

MAX_LINKS = 64
"""Nodes linked at once, nearest first (DESIGN §5). A farther one would hardly ever be the
cheapest."""


class LinkPool:
    """Links by node name. ``follow`` is fed with every change of the directory."""

    def __init__(
        self,
        topology: Topology,
        identity: LinkIdentity,
        builder: ViewBuilder,
        group: asyncio.TaskGroup,
        rng: random.Random,
    ) -> None:
        self.refused_entries = 0
        self._topology = topology
        self._identity = identity
        self._builder = builder
        self._group = group
        self._rng = rng
        self._links: dict[str, NodeLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._listed: dict[str, ServiceEntry] = {}
        self._incarnations: dict[str, str] = {}
        self._loop = asyncio.get_running_loop()
        self._events = LinkEvents(
            up=self._up,
            down=self._down,
            rtt=builder.set_rtt,
            load=lambda name, load: builder.set_load(name, load, self._loop.time()),
            cache=builder.apply_cache,
            draining=builder.set_draining,
            offers=builder.set_offers,
        )

    def get(self, name: str) -> NodeLink | None:
        """The link to a node, up or not."""
        return self._links.get(name)

    def all(self) -> list[NodeLink]:
        """Every link."""
        return list(self._links.values())

    def follow(self, entries: Iterable[ServiceEntry]) -> None:
        """Take over the directory's present content."""
        self._listed = self._nearest(self._accepted(entries))
        self._reconcile()

    def close(self) -> None:
        """End all links (streams on them hear ``link_lost``)."""
        for task in self._tasks.values():
            task.cancel()

    def _accepted(self, entries: Iterable[ServiceEntry]) -> dict[str, ServiceEntry]:
        """Entries of nodes that the topology knows; a passing entry wins over a dead namesake."""
        accepted: dict[str, ServiceEntry] = {}
        for entry in entries:
            name = entry.meta.get("name", "")
            node = self._topology.nodes.get(name)
            claims = (entry.meta.get("mesh"), entry.meta.get("site"))
            if node is None or claims != (self._topology.mesh, node.site):
                self.refused_entries += 1
                log.warning("directory entry %r names no node of the topology", entry.service_id)
                continue
            if name not in accepted or entry.status == "passing":
                accepted[name] = entry
        return accepted

    def _nearest(self, entries: dict[str, ServiceEntry]) -> dict[str, ServiceEntry]:
        sites = self._topology.sites
        home = sites[self._identity.site].position

        def distance(name: str) -> tuple[float, str]:
            site = sites[self._topology.nodes[name].site]
            return great_circle_km(home, site.position), name

        return {name: entries[name] for name in sorted(entries, key=distance)[:MAX_LINKS]}

    def _reconcile(self) -> None:
        for name, entry in self._listed.items():
            address = f"[{entry.address}]" if ":" in entry.address else entry.address
            address = f"{address}:{entry.port}"
            link = self._links.get(name)
            if link is None:
                self._start(name, address)
            else:
                link.address = address  # used by the next connection
                self._notice_rebirth(link, entry)
            self._incarnations[name] = entry.meta.get("incarnation", "")
        for name in [name for name in self._links if name not in self._listed]:
            if not self._links[name].up:
                del self._links[name]
                self._incarnations.pop(name, None)
                self._tasks.pop(name).cancel()
        self._builder.set_directory(
            {
                name: name in self._listed and self._listed[name].meta.get("drain") == "1"
                for name in self._links
            }
        )

    def _notice_rebirth(self, link: NodeLink, entry: ServiceEntry) -> None:
        """A node that the directory shows in a new incarnation needs a new connection.

        A link may be ahead of the directory, so only a change *from* the incarnation that it is
        linked to counts.
        """
        before = self._incarnations[link.node.name]
        if entry.meta.get("incarnation", "") != before and link.incarnation in ("", before):
            link.reborn()

    def _start(self, name: str, address: str) -> None:
        node = self._topology.nodes[name]
        detection_s = self._topology.detection_s
        link = NodeLink(node, address, self._identity, self._events, self._rng, detection_s)
        self._links[name] = link
        self._tasks[name] = self._group.create_task(link.run(), name=f"link {name}")

    def _up(self, name: str, hello: Hello) -> None:
        self._builder.link_up(name, hello)

    def _down(self, name: str, error: MeshError) -> None:
        self._builder.link_down(name)
        if name not in self._listed:  # after this callback: the link still has streams to tell
            self._loop.call_soon(self._reconcile)
