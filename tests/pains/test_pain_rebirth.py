"""A peer fails once or restarts, and the survivor cannot work with it for ever after."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from pop_node.kv_stream import liveness
from tests.fakes.fake_answer import answer_text
from tests.fakes.fake_connection import Faults
from tests.fakes.fake_node import FakeNode, cache_delta
from tests.pains.pain_parts import HELLO, hand_over
from tests.pop_node.kv_stream.kv_node import Node, assert_at_rest, cache_of
from tests.router.router_mesh import MODEL, RouterMesh
from wire.address import format_address
from wire.errors import MeshError
from wire.messages import Hello, TransferReport


@asynccontextmanager
async def started(name: str, incarnation: int, port: int) -> AsyncIterator[Node]:
    """A node's n-th start; ``port`` 0 takes any."""
    node = Node(name, incarnation=f"{name}-{incarnation}")
    node.address = format_address(*await node.endpoint.start("127.0.0.1", port))
    try:
        yield node
    finally:
        await node.endpoint.close()
        node.staging.close()


def cut(*nodes: Node) -> None:
    """Break every connection of these nodes, as a reset of the network does."""
    for node in nodes:
        for conn in node.endpoint._connections():
            if conn._transport is not None:
                conn._transport.abort()


def kill(node: Node) -> None:
    """End a node as SIGKILL does: no last word, no second try."""
    for machine in (node.endpoint._sender, node.endpoint._receiver):
        machine.handle = lambda event, now: []  # type: ignore[method-assign]
        machine.next_deadline = lambda: None  # type: ignore[method-assign]
    cut(node)


async def test_sglang_13054_one_broken_transfer_does_not_condemn_a_pair() -> None:
    """sgl-project/sglang 13054: one transient transfer error put the decode node's session on a
    list of the dead, and every later request of that pair failed until the prefill pod was
    restarted, though both nodes were well."""
    async with asyncio.timeout(60), Node("p") as p, Node("d") as d:
        await hand_over(p, d)
        for number in range(3):
            d.imports_held = True
            d.first_import.clear()
            transfer = os.urandom(16)
            d.receive(transfer, "p", 640, None)
            p.send(transfer, d, cache_of(640, number))
            await d.first_import.wait()
            cut(p, d)
            d.imports_held = False
            d.import_held()
            assert isinstance(await p.ends[transfer], MeshError | TransferReport)
            assert isinstance(await d.ends[transfer], MeshError | list)
            await hand_over(p, d)
            await hand_over(d, p)
        assert_at_rest(p, d)


async def test_sglang_13054_the_router_uses_the_pair_again(mesh: RouterMesh) -> None:
    """sgl-project/sglang 13054 at the router: the request that met the error goes elsewhere, the
    next one takes the same best pair as before."""
    mesh.nodes["lhr-1"].faults = Faults(leg="decode", refuse=("transfer_timeout", True), times=1)
    first = await mesh.chat()
    assert (await first.json())["choices"][0]["message"]["content"] == answer_text(HELLO, 8)
    for _ in range(5):
        response = await mesh.chat()
        pair = response.headers["x-popmesh-prefill"], response.headers["x-popmesh-decode"]
        assert pair == ("fra-1", "lhr-1")


async def meet(p: Node, d: Node) -> None:
    """Hand over at the first try."""
    transfer = os.urandom(16)
    d.receive(transfer, p.name, 100, None)
    p.send(transfer, d, cache_of(100, 1))
    assert isinstance(await p.ends[transfer], TransferReport)
    assert await d.ends[transfer] == [42]


@pytest.mark.parametrize("survivor_sends", [True, False])
async def test_vllm_49238_the_survivor_of_a_restart_needs_none_itself(
    monkeypatch: pytest.MonkeyPatch, survivor_sends: bool
) -> None:
    """vllm-project/vllm 49238: a prefill pod restarted, and the decode instance died when it took
    the new one's metadata over those of the old; in the reverse direction the next long transfer
    stalled. Here a node dies in the middle of a transfer, and again, and comes back at the same
    address under the same name; what it left behind ends, and the next transfer is like any."""
    monkeypatch.setattr(liveness, "PING_INTERVAL_S", 0.2)
    monkeypatch.setattr(liveness, "MIN_WAIT_S", 1.0)
    port, left_behind = 0, b""
    async with asyncio.timeout(60), Node("survivor") as survivor:
        for incarnation in range(1, 4):
            async with started("other", incarnation, port) as other:
                port = int(other.address.rpartition(":")[2])
                p, d = (survivor, other) if survivor_sends else (other, survivor)
                await meet(p, d)
                if left_behind:
                    assert isinstance(await survivor.ends[left_behind], MeshError)
                assert_at_rest(survivor)
                left_behind = os.urandom(16)
                d.imports_held = True
                d.first_import.clear()
                d.receive(left_behind, p.name, 640, None)
                p.send(left_behind, d, cache_of(640, incarnation))
                await d.first_import.wait()
                kill(other)
                survivor.imports_held = False
                survivor.import_held()
        assert isinstance(await survivor.ends[left_behind], MeshError)
        assert_at_rest(survivor)


async def test_mooncake_2930_a_new_incarnation_owes_nothing_to_the_old(
    mesh: RouterMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kvcache-ai/Mooncake 2930: what was remembered of a peer's earlier life, at the same address,
    kept being used. Here the router forgets the caches of the dead node at once, and uses the
    new one at once."""
    fra, iad = mesh.nodes["fra-1"], mesh.nodes["iad-1"]
    words = "a long prompt " * 400
    chat = [{"role": "user", "content": words}]
    await (await mesh.chat(messages=chat, max_tokens=2)).read()
    chain = fra.submits[0].chain
    body = {"model": MODEL, "messages": chat}

    async def cached_where() -> dict[str, int]:
        async with mesh.http.post("/popmesh/explain", json=body) as response:
            cached: dict[str, int] = (await response.json())["cached_tokens"]
            return cached

    iad.tell(cache_delta(MODEL, chain, 64))
    async with asyncio.timeout(20):
        while "iad-1" not in await cached_where():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    greeting = FakeNode.hello

    def hello_again(node: FakeNode) -> Hello:
        hello = greeting(node)
        return msgspec.structs.replace(hello, incarnation=f"{hello.incarnation}-reborn")

    monkeypatch.setattr(FakeNode, "hello", hello_again)
    for connection in list(iad.connections):
        connection.drop()
    async with asyncio.timeout(20):
        while True:
            status = await mesh.get_json("/popmesh/status")
            (seen,) = [node for node in status["nodes"] if node["name"] == "iad-1"]
            if seen["incarnation"].endswith("-reborn") and seen["engines"]:
                break
            await asyncio.sleep(0.01)
    assert "iad-1" not in await cached_where()
    pinned = await mesh.chat(headers={"x-popmesh-route": "prefill=iad-1,decode=iad-1"})
    assert pinned.status == 200
