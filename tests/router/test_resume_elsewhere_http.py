"""Clients that come back to another router than the one they lost."""

from __future__ import annotations

import asyncio

import pytest

from tests.router.resume_clients import (
    TOKENS,
    check_rest,
    cut_off,
    forgotten,
    hand_out,
    refused,
    start,
    whole,
)
from tests.router.router_mesh import two_routers


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("read", [1, 2, 7])
async def test_another_router_goes_on_where_a_dead_one_was(monkeypatch, kind, read):
    async with two_routers(monkeypatch) as (mesh, other):
        first, tickets = await cut_off(mesh, read, kind)
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
        first, tickets = await forgotten(mesh, 5)
        tickets.add(3 * TOKENS)
        second = await (await start(other.http, last_id=first.last_id)).rest()
        check_rest(first, second)
        third = await (await start(other.http, last_id=second.last_id)).rest()
        assert (third.text, third.done) == ("", True)


async def test_what_a_node_tells_is_not_believed_without_its_proof(monkeypatch):
    """The node knows an answer of that name, of another text."""
    async with two_routers(monkeypatch) as (mesh, other):
        first, tickets = await cut_off(mesh, 5)
        for node in mesh.nodes.values():
            for spoken in node.answers.values():
                spoken.ids[0] += 1
        tickets.add(3 * TOKENS)
        check_rest(first, await (await start(other.http, last_id=first.last_id)).rest())
        metrics = await (await other.http.get("/metrics")).text()
        assert 'popmesh_resumed_total{found="recomputed"} 1' in metrics


async def test_nodes_of_version_1_are_not_asked(monkeypatch):
    async with two_routers(monkeypatch) as (mesh, other):
        first, tickets = await cut_off(mesh, 4)
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
