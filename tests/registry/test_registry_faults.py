"""A real Consul that freezes, gets slow or loses its leader: what is served meanwhile, and after.

Intervals are short; ``test_registry_absence`` has those of a real mesh on a virtual clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from registry_servers import ConsulAgent, ConsulCluster
from registry_views import PATIENCE_S, Views, with_status

from popmesh.links.control import both_ways
from popmesh.links.plan import EmulatedLink, LinkFault, LinkPlan, ShapedPort
from popmesh.links.shaper import Shaper
from registry.client import Registry
from registry.entries import Registration, Snapshot
from registry.keeper import Keeper
from registry.watch import Watch
from registry.watcher import Watcher


@asynccontextmanager
async def kept(url: str, registration: Registration) -> AsyncIterator[tuple[Views, Keeper]]:
    """A node that keeps itself registered and a router that watches, each with its own client."""
    views = Views()
    async with (
        Registry.connect(url, timeout_s=0.5) as nodes,
        Registry.connect(url, timeout_s=0.5) as routers,
        asyncio.TaskGroup() as tasks,
    ):
        keeper = Keeper(nodes, replace(registration, ttl_s=1.5), rng=random.Random(1))
        watcher = Watcher(
            routers,
            registration.service,
            views.add,
            rng=random.Random(2),
            watch=Watch(wait_s=0.5),
        )
        running: list[asyncio.Task[Any]] = [
            tasks.create_task(keeper.run()),
            tasks.create_task(watcher.run()),
        ]
        await views.wait_for(with_status(a="passing"))
        yield views, keeper
        for task in running:
            task.cancel()


def draining(view: Snapshot) -> bool:
    """The node's one entry says so."""
    return [entry.meta for entry in view.entries] == [{"draining": "yes"}]


@pytest.fixture
def own_consul(tmp_path: Path) -> Iterator[ConsulAgent]:
    agent = ConsulAgent(tmp_path)
    agent.start()
    yield agent
    agent.kill()


@pytest.mark.consul
async def test_a_consul_that_freezes_changes_nothing_and_knows_the_node_again(
    own_consul: ConsulAgent, registration: Registration
) -> None:
    """Frozen for two TTLs: nothing leaves the view then, and afterwards the check passes again."""
    async with kept(own_consul.url, registration) as (views, _):
        known = len(views.all)
        own_consul.pause()
        try:
            await asyncio.sleep(3.0)
            assert len(views.all) == known
        finally:
            own_consul.resume()
        await views.wait_for(with_status(a="passing"))
        async with Registry.connect(own_consul.url) as look, asyncio.timeout(PATIENCE_S):
            index = 0
            while True:
                seen = await look.services(registration.service, wait_index=index, wait_s=2.0)
                if seen.entries[0].status == "passing":
                    break
                index = seen.index
        assert all(view.entries for view in views.all[1:])


@asynccontextmanager
async def shaped(target: str) -> AsyncIterator[tuple[str, Callable[..., None]]]:
    """(url of ``target`` behind a link, a function that puts faults on it)."""
    with socket.socket() as spare:
        spare.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{spare.getsockname()[1]}"
    plan = LinkPlan(
        [EmulatedLink("here", "there", 2.0, 100.0)],
        [ShapedPort(listen, target.removeprefix("consul://"), "here", "there")],
    )
    shaper = Shaper(plan, random.Random(3))

    def faults(*new: LinkFault) -> None:
        shaper.reconfigure(LinkPlan(plan.links, plan.ports, list(new)))

    ready = asyncio.Event()
    serving = asyncio.create_task(shaper.serve(ready))
    await ready.wait()
    try:
        yield f"consul://{listen}", faults
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


@pytest.mark.consul
async def test_a_slow_registry_is_slow_and_nothing_else(
    consul_agent: ConsulAgent, registration: Registration
) -> None:
    """Answers take most of the calls' timeout, and a third of them longer: heartbeats get through
    often enough, and while the link is dead the view stands."""
    async with (
        shaped(consul_agent.url) as (url, faults),
        kept(url, registration) as (views, keeper),
    ):
        faults(*both_ways("here", "there", rtt_ms=150.0, jitter_ms=40.0, loss=0.01))
        await keeper.set_meta({"draining": "yes"})
        await views.wait_for(draining)
        known = len(views.all)
        faults(*both_ways("here", "there", down=True))
        await asyncio.sleep(2.5)
        assert len(views.all) == known
        faults()
        await views.wait_for(with_status(a="passing"))
        assert all(view.entries for view in views.all[1:])


@pytest.mark.consul
async def test_a_lost_leader_is_waited_for(tmp_path: Path, registration: Registration) -> None:
    """The node stays in the view while the servers vote, and a change afterwards is seen."""
    cluster = ConsulCluster(tmp_path)
    await asyncio.to_thread(cluster.start)
    try:
        leader = cluster.leader(0)
        assert leader is not None
        follower = next(number for number in range(3) if number != leader)
        async with kept(cluster.url(follower), registration) as (views, keeper):
            await asyncio.to_thread(cluster.kill_server, leader)
            async with asyncio.timeout(PATIENCE_S):
                while cluster.leader(follower) in (None, leader):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await keeper.set_meta({"draining": "yes"})
            await asyncio.wait_for(keeper.wait_settled(), PATIENCE_S)
            await views.wait_for(draining)
            assert all(view.entries for view in views.all[1:])
    finally:
        await asyncio.to_thread(cluster.kill)
