"""The router with the real registry client and server, and with TLS on the mesh links."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from popmesh.authority import identity_of, init_authority, issue
from registry.client import Registry
from registry.embedded import EmbeddedRegistry
from registry.entries import Registration
from router.app import RouterConfig, serve
from router.links.node_links import SERVICE
from tests.fakes.fake_connection import FakeMesh
from tests.fakes.fake_node import FakeNode
from tests.router.router_mesh import MODEL, RouterMesh, StubDirectory, entry_of, make_topology
from topology.model import Topology
from wire.errors import ConfigError
from wire.tls import Credentials

TOPOLOGY = make_topology()


@asynccontextmanager
async def real_mesh(
    topology: Topology,
    credentials: Credentials | None = None,
    node_contexts: dict[str, ssl.SSLContext] | None = None,
) -> AsyncIterator[tuple[RouterMesh, EmbeddedRegistry, Registry]]:
    server = EmbeddedRegistry()
    url = await server.start()
    hand_over = FakeMesh()
    nodes = {
        name: FakeNode(name, node.site, hand_over, roles=tuple(sorted(node.roles)))
        for name, node in topology.nodes.items()
    }
    stop, base = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = RouterConfig("router-1", topology, url, "127.0.0.1", 0, credentials)
    async with Registry.connect(url) as registry:
        for name, node in nodes.items():
            await node.start((node_contexts or {}).get(name))
            await announce(registry, node)
        try:
            async with asyncio.timeout(40), asyncio.TaskGroup() as group:
                group.create_task(serve(config, base.set_result, stop))
                async with aiohttp.ClientSession(await base) as http:
                    mesh = RouterMesh(await base, nodes, StubDirectory(), http, stop)
                    yield mesh, server, registry
                stop.set()
        finally:
            for node in nodes.values():
                await node.stop()
            await server.stop()


async def announce(registry: Registry, node: FakeNode) -> None:
    entry = entry_of(node)
    await registry.register(
        Registration(
            service_id=node.name,
            service=SERVICE,
            address=entry.address,
            port=entry.port,
            meta=entry.meta,
            ttl_s=10.0,
            deregister_after_s=60.0,
        ),
        "passing",
    )


async def test_nodes_are_found_and_survive_the_registry() -> None:
    async with real_mesh(TOPOLOGY) as (mesh, server, _):
        await mesh.wait_ready()
        assert (await mesh.chat()).status == 200
        await server.stop()
        assert (await mesh.chat()).status == 200


async def test_an_entry_outside_the_topology_is_ignored() -> None:
    async with real_mesh(TOPOLOGY) as (mesh, _, registry):
        stranger = FakeNode("evil-1", "fra", FakeMesh())
        await stranger.start()
        await announce(registry, stranger)
        async with asyncio.timeout(20):
            while (await mesh.get_json("/popmesh/status"))["refused_registry_entries"] == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await mesh.wait_ready()
        assert not stranger.connections
        await stranger.stop()


async def test_a_registry_that_is_away_at_start_is_waited_for() -> None:
    stop, base = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = RouterConfig("router-1", TOPOLOGY, "consul://127.0.0.1:1", "127.0.0.1", 0)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(serve(config, base.set_result, stop))
        async with aiohttp.ClientSession(await base) as http:
            assert (await http.get("/health")).status == 200
            assert (await http.get("/ready")).status == 503
            models = await (await http.get("/v1/models")).json()
            assert [model["id"] for model in models["data"]] == [MODEL]
        stop.set()


async def test_config_errors_refuse_to_start() -> None:
    taken = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    for name, url, at in (
        ("nobody", "consul://127.0.0.1:1", 0),
        ("router-1", "ftp://x", 0),
        ("router-1", "consul://127.0.0.1:1", port),
    ):
        with pytest.raises(ConfigError):
            await serve(RouterConfig(name, TOPOLOGY, url, "127.0.0.1", at))
    taken.close()


async def test_links_prove_who_they_are(tmp_path: Path) -> None:
    authority = tmp_path / "ca"
    init_authority(authority)
    held = {
        name: Credentials.load(issue(authority, identity_of(TOPOLOGY, name)))
        for name in (*TOPOLOGY.nodes, "router-1")
    }
    contexts = {name: held[name].server_context() for name in TOPOLOGY.nodes}
    contexts["lhr-1"] = contexts["fra-1"]  # fra's certificate on lhr's address
    async with real_mesh(TOPOLOGY, held["router-1"], contexts) as (mesh, _, _):
        await mesh.wait_ready(nodes=2)
        status = await mesh.get_json("/popmesh/status")
        errors = {node["name"]: node["link_error"] for node in status["nodes"]}
        while errors["lhr-1"] is None:
            await asyncio.sleep(0.01)
            status = await mesh.get_json("/popmesh/status")
            errors = {node["name"]: node["link_error"] for node in status["nodes"]}
        assert "certificate" in errors["lhr-1"]
        answer = await mesh.chat()
        assert answer.headers["x-popmesh-decode"] == "iad-1"
