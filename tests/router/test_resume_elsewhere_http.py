"""Clients that come back to another router than the one they lost."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp
import pytest

import router.app
from router.app import RouterConfig, serve
from tests.router.resume_clients import TOKENS, check_rest, hand_out, refused, start, whole
from tests.router.router_mesh import ANY_PORT, StubDirectory, entry_of, make_topology, running_mesh
from topology.model import Router


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


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("read", [1, 2, 7])
async def test_another_router_goes_on_where_a_dead_one_was(monkeypatch, kind, read):
    async with two_routers(monkeypatch) as (mesh, other):
        tickets = hand_out(mesh, read)
        first = await (await start(mesh.http, kind)).texts(read)
        first.response.close()
        await mesh.wait_idle()
        tickets.add(TOKENS)
        second = await (await start(other.http, kind, last_id=first.last_id)).rest()
        check_rest(first, second, kind)
        hand_out(mesh, TOKENS)
        assert second.usage == (await (await start(mesh.http, kind)).rest()).usage
        metrics = await (await other.http.get("/metrics")).text()
        assert 'popmesh_resumed_total{found="elsewhere"} 1' in metrics


async def test_tokens_that_the_first_router_never_relayed_come_once(monkeypatch):
    async with two_routers(monkeypatch) as (mesh, other):
        tickets = hand_out(mesh, 6)
        first = await (await start(mesh.http)).texts(2)
        last_id, text = first.last_id, first.text
        await first.texts(6)
        tickets.add(TOKENS)
        second = await (await start(other.http, last_id=last_id)).rest()
        assert text + second.text == whole()
        assert second.usage["completion_tokens"] == TOKENS


async def test_the_first_router_lets_go_when_another_takes_over(monkeypatch):
    """And when the client comes back to it, it asks the nodes like any other."""
    async with two_routers(monkeypatch) as (mesh, other):
        tickets = hand_out(mesh, 4)
        first = await (await start(mesh.http)).texts(4)
        resuming = asyncio.ensure_future(start(other.http, last_id=first.last_id))
        await first.rest()
        assert first.error["code"] == "taken_over"
        tickets.add(3)
        second = await (await resuming).texts(3)
        assert first.text + second.text == whole(count=7)
        second.response.close()
        await other.wait_idle()
        assert (await mesh.get_json("/popmesh/status"))["resumable"]["records"] == 0
        tickets.add(TOKENS)
        third = await (await start(mesh.http, last_id=second.last_id)).rest()
        assert first.text + second.text + third.text == whole()
        assert (third.done, third.usage["completion_tokens"]) == (True, TOKENS)


async def test_a_complete_answer_can_be_read_at_another_router(monkeypatch):
    async with two_routers(monkeypatch) as (mesh, other):
        hand_out(mesh, TOKENS)
        first = await (await start(mesh.http)).rest()
        await mesh.wait_idle()
        before = sum(len(node.submits) for node in mesh.nodes.values())
        request_id = first.response.headers["x-popmesh-request-id"]
        second = await (await start(other.http, last_id=f"{request_id}:5")).rest()
        assert whole(count=5) + second.text == whole()
        assert (second.finish, second.done, second.usage) == ("length", True, first.usage)
        assert sum(len(node.submits) for node in mesh.nodes.values()) == before


async def test_when_the_router_and_all_nodes_have_forgotten_it_is_computed_again(monkeypatch):
    async with two_routers(monkeypatch) as (mesh, other):
        tickets = hand_out(mesh, 5)
        first = await (await start(mesh.http)).texts(5)
        first.response.close()
        await mesh.wait_idle()
        for node in mesh.nodes.values():
            node.answers.clear()
        tickets.add(3 * TOKENS)
        second = await (await start(other.http, last_id=first.last_id)).rest()
        check_rest(first, second)
        third = await (await start(other.http, last_id=second.last_id)).rest()
        assert (third.text, third.done) == ("", True)


async def test_what_a_node_tells_is_not_believed_without_its_proof(monkeypatch):
    """The node knows an answer of that name, of another text."""
    async with two_routers(monkeypatch) as (mesh, other):
        tickets = hand_out(mesh, 5)
        first = await (await start(mesh.http)).texts(5)
        first.response.close()
        await mesh.wait_idle()
        for node in mesh.nodes.values():
            for spoken in node.answers.values():
                spoken.ids[0] += 1
        tickets.add(3 * TOKENS)
        check_rest(first, await (await start(other.http, last_id=first.last_id)).rest())
        metrics = await (await other.http.get("/metrics")).text()
        assert 'popmesh_resumed_total{found="recomputed"} 1' in metrics


async def test_nodes_of_version_1_are_not_asked(monkeypatch):
    async with two_routers(monkeypatch) as (mesh, other):
        tickets = hand_out(mesh, 4)
        first = await (await start(mesh.http)).texts(4)
        first.response.close()
        await mesh.wait_idle()
        for node in mesh.nodes.values():
            node.max_version = 1
            for connection in list(node.connections):
                connection.drop()
            await node.wait_until(lambda node=node: not node.connections)
        await other.wait_ready()
        tickets.add(TOKENS)
        place, _, _ = first.last_id.partition("~")
        status, code, _ = await refused(other.http, last_id=place)
        assert (status, code) == (404, "stream_unknown")
        assert not any(node.attaches for node in mesh.nodes.values())
