"""A socket for every transfer, until there are none left and the peer is blamed."""

from __future__ import annotations

import asyncio

import pytest

from pop_node.kv_stream.intake import Intake
from pop_node.kv_stream.link import STRIPES
from tests.fakes.fake_connection import FakeConnection
from tests.pains.pain_parts import hand_over
from tests.pop_node.kv_stream.kv_node import Node, assert_at_rest
from tests.router.router_mesh import RouterMesh


async def test_sglang_31208_a_hundred_transfers_use_the_same_few_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sgl-project/sglang 31208: every KV transfer dialled a connection of its own; under load the
    client's ports ran out, and both nodes took each other for dead."""
    accepted = 0
    accept = Intake.accept

    def counted(intake: Intake) -> object:
        nonlocal accepted
        accepted += 1
        return accept(intake)

    monkeypatch.setattr(Intake, "accept", counted)
    async with asyncio.timeout(60), Node("p") as p, Node("d") as d:
        for _ in range(20):  # one after the other, and five at a time
            await asyncio.gather(*(hand_over(p, d, 30 + n) for n in range(5)))
        assert accepted == STRIPES
        assert p.endpoint.statistics().connections_now == STRIPES
        assert p.endpoint.statistics().delivered == 100
        assert_at_rest(p, d)


async def test_sglang_31208_neither_does_the_router_dial_per_request(
    mesh: RouterMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sgl-project/sglang 31208, on the way from the router to the nodes: whatever number of
    requests, one connection for each node."""
    made = 0
    connect = FakeConnection.connection_made

    def counted(connection: object, transport: asyncio.BaseTransport) -> None:
        nonlocal made
        made += 1
        connect(connection, transport)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeConnection, "connection_made", counted)
    for _ in range(10):
        responses = await asyncio.gather(*(mesh.chat(max_tokens=3) for _ in range(20)))
        for response in responses:
            assert response.status == 200
            await response.read()
    assert made == 0
    assert [len(node.connections) for node in mesh.nodes.values()] == [1, 1, 1]
    await mesh.wait_idle()
