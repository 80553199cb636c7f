"""Directories: down for seconds and never well again, slow to forget the dead, or out of date."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from registry.client import Registry
from registry.entries import Registration, ServiceEntry, Snapshot
from registry.keeper import Keeper
from registry.watch import HOLD_S, Answered, Publish, Query, Start, Tick, Watch
from registry.watcher import Watcher
from router.app import RouterConfig, serve
from router.links.node_links import SERVICE
from tests.fakes.fake_answer import answer_text
from tests.fakes.fake_connection import FakeMesh
from tests.fakes.fake_node import FakeNode
from tests.pains.pain_parts import HELLO
from tests.registry.registry_servers import (
    CannedServer,
    Restartable,
    RestartableConsul,
    RestartableEmbedded,
    http_answer,
)
from tests.router.router_mesh import (
    RouterMesh,
    StubDirectory,
    entry_of,
    make_topology,
    running_mesh,
)
from topology.model import Topology

BOTH = ("prefill", "decode")


@pytest.fixture(params=["embedded", pytest.param("consul", marks=pytest.mark.consul)])
async def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Restartable]:
    """A registry that comes back empty when it is started again."""
    server: Restartable
    if request.param == "embedded":
        server = RestartableEmbedded()
    else:
        server = RestartableConsul(tmp_path_factory.mktemp("consul"))
    await server.start()
    yield server
    await server.kill()


def registration_of(node: FakeNode) -> Registration:
    entry = entry_of(node)
    return Registration(
        node.name, SERVICE, entry.address, entry.port, entry.meta, 3.0, deregister_after_s=60.0
    )


@asynccontextmanager
async def kept_mesh(
    url: str, topology: Topology
) -> AsyncIterator[tuple[RouterMesh, dict[str, Keeper]]]:
    """A real router that finds fake nodes through a real registry, each kept by a real keeper."""
    hand_over = FakeMesh()
    nodes = {
        name: FakeNode(name, node.site, hand_over, roles=tuple(sorted(node.roles)))
        for name, node in topology.nodes.items()
    }
    for node in nodes.values():
        await node.start()
    stop, base = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = RouterConfig("router-1", topology, url, "127.0.0.1", 0)
    try:
        async with Registry.connect(url) as registry, asyncio.TaskGroup() as group:
            keepers = {
                name: Keeper(registry, registration_of(node)) for name, node in nodes.items()
            }
            keeping = [group.create_task(keeper.run()) for keeper in keepers.values()]
            group.create_task(serve(config, base.set_result, stop))
            async with aiohttp.ClientSession(await base) as http:
                mesh = RouterMesh(await base, nodes, StubDirectory(), http, stop)
                await mesh.wait_ready()
                yield mesh, keepers
            stop.set()
            for task in keeping:
                task.cancel()
    finally:
        for node in nodes.values():
            await node.stop()


async def test_dynamo_3493_an_outage_of_the_directory_heals_by_itself(
    server: Restartable,
) -> None:
    """ai-dynamo/dynamo 3493: etcd was away for seconds, leases were lost, and front end, workers
    and planner had to be restarted. Here the mesh serves through the outage, a directory that
    comes back *empty* is filled again by the nodes, and the router follows it again."""
    async with asyncio.timeout(60), kept_mesh(server.url, make_topology()) as (mesh, keepers):
        await server.kill()
        for _ in range(10):
            assert (await mesh.chat()).status == 200
        await server.start()
        async with Registry.connect(server.url) as registry:
            while len((await registry.services(SERVICE)).entries) < len(mesh.nodes):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        # The router hears what happens from now on: two nodes leave its sight by their own word.
        for name in ("fra-1", "lhr-1"):
            meta = registration_of(mesh.nodes[name]).meta
            assert await keepers[name].set_meta({**meta, "drain": "1"})
        while (await mesh.chat()).headers["x-popmesh-prefill"] != "iad-1":  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_dynamo_1424_a_node_that_died_but_stands_in_the_directory_fails_no_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ai-dynamo/dynamo 1424: one of two workers was stopped while a hundred requests came in; until
    its lease ran out, the router sent it every second one, and 32 of 100 failed."""
    topology = make_topology({"fra-1": BOTH, "fra-2": BOTH})
    async with running_mesh(monkeypatch, topology) as mesh:
        answers, dies = [], mesh.nodes["fra-2"]
        for number in range(20):
            asking = [asyncio.ensure_future(mesh.chat()) for _ in range(5)]
            if number == 6:
                dies.go.clear()
                await dies.wait_until(lambda: dies.active > 0)
                await dies.stop()  # with requests on it, and the directory keeps naming it
            answers += await asyncio.gather(*asking)
        served = {answer.headers["x-popmesh-decode"] for answer in answers}
        assert served == {"fra-1", "fra-2"}
        for answer in answers:
            assert answer.status == 200
            body = await answer.json()
            assert body["choices"][0]["message"]["content"] == answer_text(HELLO, 8)
        assert len(answers) == 100


class LeaderlessServer(CannedServer):
    """A Consul that answers, then loses its quorum, then has one again."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(b"")
        self.asked = 0
        self.news = asyncio.Event()
        self.list(names, 7)

    def list(self, names: list[str], index: int) -> None:
        instances: list[dict[str, Any]] = [
            {
                "Node": {"Address": "127.0.0.1"},
                "Service": {"ID": n, "Service": SERVICE, "Address": "127.0.0.1", "Port": 1},
                "Checks": [{"Status": "passing"}],
            }
            for n in names
        ]
        self._answer = http_answer(json.dumps(instances).encode(), X_Consul_Index=str(index))

    def lose_quorum(self) -> None:
        self._answer = http_answer(b"No cluster leader", "500 Internal Server Error")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += 1
        self.news.set()
        await super()._accept(reader, writer)

    async def until_asked(self, times: int) -> None:
        wanted = self.asked + times
        while self.asked < wanted:
            self.news.clear()
            await self.news.wait()


async def test_consul_3630_a_local_quorum_that_is_lost_takes_no_node_away() -> None:
    """hashicorp/consul 3630: when the local servers had no leader, looking up services of *other*
    datacenters failed too, though those were well. A registry that cannot answer is no registry
    without nodes: the last view stays, and is said to be old."""
    views: list[Snapshot] = []
    async with (
        asyncio.timeout(60),
        LeaderlessServer(["a", "b"]) as server,
        Registry.connect(server.url) as registry,
        asyncio.TaskGroup() as group,
    ):
        watcher = Watcher(registry, SERVICE, views.append, rng=random.Random(1))
        watching = group.create_task(watcher.run())
        await server.until_asked(2)
        assert [each.service_id for each in views[-1].entries] == ["a", "b"]
        server.lose_quorum()
        await server.until_asked(4)
        assert len(views) == 1
        assert watcher.snapshot == views[0]
        age = watcher.age_s
        assert age is not None
        assert age > 0
        server.list(["a", "b", "c"], 9)
        while len(views) < 2:
            await server.until_asked(1)
        assert [each.service_id for each in views[-1].entries] == ["a", "b", "c"]
        watching.cancel()


def listed(index: int, *names: str) -> Answered:
    entries = (ServiceEntry(n, SERVICE, "192.0.2.1", 1, {}, "passing") for n in names)
    return Answered(Snapshot(index, tuple(entries)))


def test_consul_5919_a_follower_that_lags_behind_takes_no_node_away() -> None:
    """hashicorp/consul 5919: a server that was cut off from its leader went on answering with what
    it knew. A view that goes back in time is noticed by its index: nodes that it does not know
    yet stay, for the time that they need to be seen again, and the next question waits for
    nothing."""
    watch, now = Watch(), 0.0
    watch.handle(Start(), now)
    watch.handle(listed(50, "a", "b", "c"), now)
    now = 1.0
    assert watch.handle(Tick(), now) == [Query(50, watch._wait_s)]
    effects = watch.handle(listed(20, "a"), now)  # the stale follower
    assert not [effect for effect in effects if isinstance(effect, Publish)]
    now = 2.0
    assert watch.handle(Tick(), now) == [Query(0, watch._wait_s)]
    effects = watch.handle(listed(51, "a", "b", "c"), now)  # it caught up
    assert not [effect for effect in effects if isinstance(effect, Publish)]
    # A node that really left is forgotten in the end, and not before.
    now = 3.0
    watch.handle(Tick(), now)
    watch.handle(listed(10, "a", "b"), now)
    assert watch.view is not None
    assert [each.service_id for each in watch.view.entries] == ["a", "b", "c"]
    watch.handle(Tick(), now + HOLD_S)
    assert [each.service_id for each in watch.view.entries] == ["a", "b"]


async def test_consul_5919_the_router_believes_its_links_more_than_a_stale_directory(
    mesh: RouterMesh,
) -> None:
    """hashicorp/consul 5919 at the router: a directory that has forgotten live nodes, or names a
    dead address for one, costs no request."""
    lhr = mesh.nodes["lhr-1"]
    stale = entry_of(lhr)
    old = ServiceEntry(stale.service_id, stale.service, "127.0.0.1", 1, stale.meta, "critical")
    for entries in ([], [old]):
        mesh.directory.list(entries)
        response = await mesh.chat()
        assert response.status == 200
        assert response.headers["x-popmesh-decode"] == "lhr-1"
