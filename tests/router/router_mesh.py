"""A router with fake nodes in one event loop: topology, stub directory, HTTP client."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest

import router.app
from registry.entries import ServiceEntry, Snapshot
from router.app import RouterConfig, serve
from router.request.admission import Limits
from tests.fakes.fake_connection import FakeMesh
from tests.fakes.fake_node import FakeNode
from topology.geography import link_between
from topology.model import Address, Link, Model, Node, Position, Router, Site, Tenant, Topology
from wire.messages import MAX_VERSION

MODEL = "fake-model"
ANY_PORT = Address("127.0.0.1", 0)


def make_topology(
    roles: dict[str, tuple[str, ...]] | None = None,
    tenants: tuple[Tenant, ...] = (),
    regions: frozenset[str] = frozenset(),
) -> Topology:
    """Sites fra and lhr (eu), iad (na), syd (ap); nodes ``SITE-N`` with the given roles."""
    both = ("prefill", "decode")
    roles = roles or {"fra-1": ("prefill",), "lhr-1": ("decode",), "iad-1": both}
    nodes = {
        name: Node(
            name=name,
            site=name.partition("-")[0],
            roles=frozenset(node_roles),  # type: ignore[arg-type]
            models=(MODEL,),
            mesh=ANY_PORT,
            kv=ANY_PORT,
        )
        for name, node_roles in roles.items()
    }
    sites = (
        Site("fra", Position(50.03, 8.57), "eu"),
        Site("lhr", Position(51.47, -0.45), "eu"),
        Site("iad", Position(38.95, -77.46), "na"),
        Site("syd", Position(-33.95, 151.18), "ap"),
    )
    return Topology(
        mesh="test",
        models={MODEL: Model(MODEL, regions=regions)},
        sites={site.name: site for site in sites},
        nodes=nodes,
        routers={"router-1": Router("router-1", "fra", ANY_PORT)},
        links={frozenset(("fra", "lhr")): Link("fra", "lhr", 15.0, 1000.0)},
        tenants={tenant.name: tenant for tenant in tenants},
    )


def entry_of(node: FakeNode, drain: bool = False) -> ServiceEntry:
    """The directory's entry of a fake node."""
    host, _, port = node.address.rpartition(":")
    meta = {"mesh": node.mesh_name, "name": node.name, "site": node.site}
    meta |= {"incarnation": node.incarnation, "drain": "1" if drain else "0"}
    return ServiceEntry(node.name, "popmesh-node", host, int(port), meta, "passing")


class StubDirectory:
    """Stands in for ``registry.watcher.Watcher``: what the test lists is what there is."""

    def __init__(self) -> None:
        self._on_change: Callable[[Snapshot], None] | None = None
        self._entries: tuple[ServiceEntry, ...] = ()
        self.age_s: float | None = 0.0

    def attach(
        self, registry: object, service: str, on_change: Callable[[Snapshot], None]
    ) -> StubDirectory:
        """Construction, as the application does it."""
        self._on_change = on_change
        return self

    def list(self, entries: Iterable[ServiceEntry]) -> None:
        """Replace the content."""
        self._entries = tuple(entries)
        if self._on_change is not None:
            self._on_change(Snapshot(1, self._entries))

    async def run(self) -> None:
        """Publish what there is and wait."""
        self.list(self._entries)
        await asyncio.Event().wait()


@dataclass(slots=True)
class RouterMesh:
    """A running router and its fakes."""

    url: str
    nodes: dict[str, FakeNode]
    directory: StubDirectory
    http: aiohttp.ClientSession
    stop: asyncio.Event

    async def chat(self, headers: dict[str, str] | None = None, **body: Any) -> Any:
        """POST a chat; the caller closes the response."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **body}
        return await self.http.post("/v1/chat/completions", json=body, headers=headers)

    async def get_json(self, path: str) -> Any:
        """GET a JSON document."""
        async with self.http.get(path) as response:
            return await response.json()

    async def wait_ready(self, nodes: int | None = None) -> None:
        """Until that many nodes are linked with a load (default: all) and a route exists."""
        expected = len(self.nodes) if nodes is None else nodes
        while True:
            status = await self.get_json("/popmesh/status")
            up = [n for n in status["nodes"] if n["link"] == "up" and n["engines"]]
            if len(up) == expected and (status["routable"] or not up):
                return
            await asyncio.sleep(0.01)

    async def wait_status(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Until ``condition`` holds of the engines, by node, that the router knows."""
        while True:
            status = await self.get_json("/popmesh/status")
            if condition({n["name"]: n["engines"][0] for n in status["nodes"] if n["engines"]}):
                return
            await asyncio.sleep(0.01)

    async def wait_idle(self) -> None:
        """Until no node runs anything and the router holds nothing."""
        for node in self.nodes.values():
            await node.wait_until(lambda node=node: node.active == 0)  # type: ignore[misc]
        while True:
            status = await self.get_json("/popmesh/status")
            metrics = await (await self.http.get("/metrics")).text()
            if status["running"] == 0 and "popmesh_reservations 0" in metrics:
                assert all(node["streams"] == 0 for node in status["nodes"])
                return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running_mesh(
    monkeypatch: pytest.MonkeyPatch,
    topology: Topology | None = None,
    limits: Limits | None = None,
    max_version: int = MAX_VERSION,
    trusted: ssl.SSLContext | None = None,
    **config: Any,
) -> AsyncIterator[RouterMesh]:
    """Start fakes for every node of the topology and a router over them.

    ``max_version`` is the newest mesh wire that the nodes know; ``trusted`` is what clients of a
    router with ``https`` go by.
    """
    topology = topology or make_topology()
    hand_over = FakeMesh()
    nodes = {
        name: FakeNode(
            name,
            node.site,
            hand_over,
            roles=tuple(sorted(node.roles)),
            max_version=max_version,
            rtt_s=(link_between(topology, "fra", node.site).rtt_ms or 0.0) / 1e3,
        )
        for name, node in topology.nodes.items()
    }
    for node in nodes.values():
        await node.start()
    directory = StubDirectory()
    directory.list(entry_of(node) for node in nodes.values())
    monkeypatch.setattr(router.app, "Watcher", directory.attach)
    stop = asyncio.Event()
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = RouterConfig("router-1", topology, "consul://127.0.0.1:1", "127.0.0.1", 0, **config)
    settings = replace(settings, limits=limits or Limits(shutdown_s=5.0))
    try:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(serve(settings, url.set_result, stop))
            connector = aiohttp.TCPConnector(ssl=True if trusted is None else trusted)
            async with aiohttp.ClientSession(await url, connector=connector) as http:
                mesh = RouterMesh(await url, nodes, directory, http, stop)
                await mesh.wait_ready()
                yield mesh
            stop.set()
    finally:
        for node in nodes.values():
            await node.stop()


@asynccontextmanager
async def two_routers(monkeypatch):
    """A mesh and a client session to a second router over the same fake nodes."""
    topology = make_topology()
    topology = replace(
        topology, routers={**topology.routers, "router-2": Router("router-2", "lhr", ANY_PORT)}
    )
    async with running_mesh(monkeypatch, topology) as mesh:
        directory, stop = StubDirectory(), asyncio.Event()
        directory.list(entry_of(node) for node in mesh.nodes.values())
        monkeypatch.setattr(router.app, "Watcher", directory.attach)
        url = asyncio.get_running_loop().create_future()
        config = RouterConfig("router-2", topology, "consul://127.0.0.1:1", "127.0.0.1", 0)
        async with asyncio.TaskGroup() as group:
            group.create_task(serve(config, url.set_result, stop))
            async with aiohttp.ClientSession(await url) as http:
                other = replace(mesh, url=await url, http=http, directory=directory, stop=stop)
                await other.wait_ready()
                yield mesh, other
            stop.set()
