"""A simulated router: links and view around the real machines; stands in for ``router.links``.

``router.dispatch`` is the real one; clients are served by ``router_clients``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry.entries import Snapshot
from router.dispatch import Dispatch
from router.request.admission import Admission, Limits
from router.request.record import RequestRecord
from router.router_metrics import RouterMetrics
from router.routing.view_builder import ViewBuilder
from tests.sim.clock import Process
from tests.sim.links import End, Network
from tests.sim.node_shell import MESH
from tests.sim.registry_shell import SimWatcher
from tests.sim.router_clients import ClientEnd, SimResumer
from tests.sim.router_link_end import SimNodeLink
from topology.model import Topology
from wire.messages import (
    MAX_VERSION,
    MIN_VERSION,
    CacheDelta,
    Hello,
    Load,
    Offers,
)


class SimDispatch(Dispatch):
    """Transfer ids come from the run's own source of chance."""

    def transfer_id(self) -> bytes:
        return self.rng.randbytes(16)


class SimRouter:
    """One router process; also the pool of its links."""

    def __init__(
        self, process: Process, network: Network, topology: Topology, site: str, address: str
    ) -> None:
        self.process = process
        self.network = network
        self.site = site
        self.detection_s = topology.detection_s
        self.builder = ViewBuilder(topology, site)
        self.links: dict[str, SimNodeLink] = {}
        self.violations: list[str] = []
        self.records: list[RequestRecord] = []
        pool: Any = self
        admission, rng = Admission(Limits()), process.sim.rng
        self.dispatch = SimDispatch(
            self.builder, pool, admission, b"simulated key", rng, RouterMetrics()
        )
        self.topology = topology
        self.resumer = SimResumer(self.dispatch)
        self._listed: dict[str, Mapping[str, str]] = {}
        self._addresses: dict[str, str] = {}
        self._incarnations: dict[str, str] = {}
        network.listen(address, process.host, self)
        self.watcher = SimWatcher(process, network, self._follow)

    def kill(self) -> None:
        self.process.kill()

    def accept(self, end: End) -> None:
        ClientEnd(self, end)

    def all(self) -> list[SimNodeLink]:
        """Every link, as ``LinkPool``."""
        return list(self.links.values())

    def get(self, name: str) -> SimNodeLink | None:
        """The link to a node, as ``LinkPool``."""
        return self.links.get(name)

    # ---- the directory (``router.links.node_links``) ----------------------------------------

    def _follow(self, snapshot: Snapshot) -> None:
        self._listed = {entry.meta["name"]: entry.meta for entry in snapshot.entries}
        self._addresses = {e.meta["name"]: f"{e.address}:{e.port}" for e in snapshot.entries}
        self._reconcile()

    def _reconcile(self) -> None:
        for name, meta in self._listed.items():
            link = self.links.get(name)
            if link is None:
                self.links[name] = SimNodeLink(self, name, self._addresses[name])
                continue
            listed = meta["incarnation"]
            before, self._incarnations[name] = self._incarnations.get(name), listed
            if listed != before and link.incarnation in ("", before):
                link.reborn()
        for name in [name for name in self.links if name not in self._listed]:
            if not self.links[name].up:
                self._incarnations.pop(name, None)
                self.links.pop(name).stop()
        self.builder.set_directory(
            {
                name: name in self._listed and self._listed[name]["drain"] == "1"
                for name in self.links
            }
        )

    def hello(self) -> Hello:
        return Hello(
            MIN_VERSION,
            MAX_VERSION,
            MESH,
            "router",
            self.process.host,
            self.site,
            self.process.name,
            [],
            [],
        )

    def link_up(self, name: str, hello: Hello) -> None:
        self.builder.link_up(name, hello)

    def link_down(self, name: str) -> None:
        self.builder.link_down(name)
        if name not in self._listed:
            self.process.call_later(0.0, self._reconcile)

    def link_rtt(self, name: str, rtt_ms: float) -> None:
        self.builder.set_rtt(name, rtt_ms)

    def link_said(self, name: str, message: Any) -> None:
        if isinstance(message, Load):
            self.builder.set_load(name, message, self.process.time())
        elif isinstance(message, CacheDelta):
            self.builder.apply_cache(name, message)
        elif isinstance(message, Offers):
            self.builder.set_offers(name, message.models)
        else:
            self.builder.set_draining(name)
