"""Clients that come back again while their answer is computed again: nothing of that is lost."""

from __future__ import annotations

import asyncio

import pytest

from router.http.resume import Resumer
from tests.router.resume_clients import (
    HELLO,
    TOKENS,
    ask,
    check_rest,
    forgotten,
    start,
    until_status,
    whole,
)
from tests.router.router_mesh import two_routers
from wire.prefix import canonical_bytes

READ, ANEW = 8, 5
OTHER_BODY = {"messages": [{"role": "user", "content": "something else"}]}


async def hurry(mesh, tickets, last_id, **body):
    """A client that comes back; returns once some of its answer was computed again."""
    asking = asyncio.ensure_future(ask(mesh.http, last_id=last_id, **body))
    tickets.add(ANEW)
    enough = len(canonical_bytes(HELLO)) + len(whole(count=ANEW))
    await until_status(mesh, lambda status: status["resumable"]["bytes"] >= enough)
    return asking


async def leave(mesh, asking):
    """It has no patience."""
    asking.cancel()
    await mesh.wait_idle()


def forced(*meshes_before):
    """How many tokens later attempts were given, by (mesh, its submits before)."""
    return {
        len(submit.forced_ids)
        for mesh, before in meshes_before
        for name, node in mesh.nodes.items()
        for submit in node.submits[before[name] :]
    }


def submits(mesh):
    return {name: len(node.submits) for name, node in mesh.nodes.items()}


@pytest.mark.parametrize("knows", ["router", "nodes"])
async def test_who_left_and_comes_back_goes_on_where_the_computation_was(monkeypatch, knows):
    async with two_routers(monkeypatch) as (mesh, other):
        first, tickets = await forgotten(mesh, READ)
        await leave(other, await hurry(other, tickets, first.last_id))
        before, again = submits(mesh), other
        if knows == "nodes":
            monkeypatch.setattr(Resumer, "_here", lambda self, key: None)
            again = mesh
        else:
            for node in mesh.nodes.values():
                node.answers.clear()
        tickets.add(TOKENS)
        check_rest(first, await (await start(again.http, last_id=first.last_id)).rest())
        (given,) = forced((mesh, before))
        assert 0 < given <= ANEW
        metrics = await (await again.http.get("/metrics")).text()
        assert 'popmesh_resumed_total{found="recomputed"} 1' in metrics


@pytest.mark.parametrize("there", [False, True])
async def test_who_only_seems_gone_is_taken_over(monkeypatch, there):
    """At the router where its first connection still waits, or at another."""
    async with two_routers(monkeypatch) as (mesh, other):
        first, tickets = await forgotten(mesh, READ)
        waiting = await hurry(other, tickets, first.last_id)
        before = submits(mesh)
        if there:
            monkeypatch.setattr(Resumer, "_here", lambda self, key: None)
        again = asyncio.ensure_future(start((mesh if there else other).http, last_id=first.last_id))
        async with await waiting as response:
            assert response.status == 502
            assert (await response.json())["error"]["code"] == "taken_over"
        tickets.add(TOKENS)
        check_rest(first, await (await again).rest())
        (given,) = forced((mesh, before))
        assert 0 < given <= ANEW
        await mesh.wait_idle()
        await other.wait_idle()


async def test_a_beginning_that_proves_to_be_of_another_answer_is_thrown_away(monkeypatch):
    async with two_routers(monkeypatch) as (mesh, other):
        first, tickets = await forgotten(mesh, READ)
        await leave(other, await hurry(other, tickets, first.last_id, **OTHER_BODY))
        before = submits(mesh)
        tickets.add(3 * TOKENS)
        check_rest(first, await (await start(other.http, last_id=first.last_id)).rest())
        given = forced((mesh, before))
        assert 0 in given, "from the beginning"
        assert len(given) == 2, "after it went on as if it were the same"
        metrics = await (await other.http.get("/metrics")).text()
        assert 'popmesh_resumed_total{found="recomputed"} 1' in metrics
        assert 'popmesh_resumed_total{found="unknown"} 1' not in metrics
