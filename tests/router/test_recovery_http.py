"""Recovery through a real router: what breaks, what is paired anew, what the client reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from router.request.patience import MAX_ATTEMPTS
from tests.fakes.fake_answer import answer_text
from tests.fakes.fake_connection import Faults
from tests.fakes.fake_node import FakeNode, idle_engine
from tests.router.router_mesh import MODEL, RouterMesh, entry_of, make_topology, running_mesh
from wire.messages import ChatInput, ChatTurn, Failed, Load

HELLO = ChatInput([ChatTurn("user", "hello")])
BOTH = ("prefill", "decode")
PAIRED = {"fra-1": ("prefill",), "lhr-1": ("decode",), "iad-1": ("decode",)}


@pytest.fixture
async def mesh(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RouterMesh]:
    """One prefill node and two decode nodes, of which lhr is the nearer."""
    async with running_mesh(monkeypatch, make_topology(PAIRED)) as running:
        yield running


async def read_text(response: Any) -> tuple[str, list[Any]]:
    """The whole text of a stream, and its last two events."""
    events: list[Any] = []
    async for line in response.content:
        data = line.decode().strip()
        if data.startswith("data: "):
            data = data.removeprefix("data: ")
            events.append(data if data == "[DONE]" else json.loads(data))
    deltas = [c["delta"] for e in events if isinstance(e, dict) for c in e.get("choices", ())]
    return "".join(delta.get("content", "") for delta in deltas), events[-2:]


async def record_of(mesh: RouterMesh, response: Any) -> Any:
    return await mesh.get_json(f"/popmesh/requests/{response.headers['x-popmesh-request-id']}")


async def metric(mesh: RouterMesh, name: str) -> float:
    text = await (await mesh.http.get("/metrics")).text()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("how", ["fail", "drop", "detach"])
async def test_a_decode_node_that_dies_in_flight_costs_no_second_prefill(
    mesh: RouterMesh, how: Any
) -> None:
    fra, lhr, iad = (mesh.nodes[name] for name in ("fra-1", "lhr-1", "iad-1"))
    lhr.faults = Faults(leg="decode", in_flight=how, times=1)
    response = await mesh.chat(stream=True)
    text, last = await read_text(response)
    assert (text, last[-1]) == (answer_text(HELLO, 8), "[DONE]")
    assert [submit.leg for submit in fra.submits] == ["prefill"]  # the prompt was computed once
    (retarget,) = fra.retargets
    (second,) = iad.submits
    assert (retarget.stream, retarget.attempt) == (fra.submits[0].stream, 2)
    assert (second.stream, second.attempt, second.leg) == (retarget.stream, 2, "decode")
    assert second.forced_ids == fra.submits[0].forced_ids
    assert second.transfer is not None
    assert second.transfer.id == retarget.transfer.id != fra.submits[0].transfer.id  # type: ignore[union-attr]
    first, then = (await record_of(mesh, response))["attempts"]
    assert (first["route"]["decode"], then["route"]["decode"]) == ("lhr-1", "iad-1")
    assert then["outcome"] == "stop"
    assert then["recovery"]["kind"] == "retarget"
    assert then["recovery"]["price_s"] == pytest.approx(then["route"]["cost_s"])
    assert then["recovery"]["other_price_s"] > then["recovery"]["price_s"]
    assert await metric(mesh, 'popmesh_router_recoveries_total{kind="retarget"}') == 1
    await mesh.wait_idle()


async def test_a_retarget_before_the_first_token(mesh: RouterMesh) -> None:
    """The prefill leg is still at its prompt when its decode node goes."""
    fra, lhr, iad = (mesh.nodes[name] for name in ("fra-1", "lhr-1", "iad-1"))
    fra.go.clear()
    lhr.faults = Faults(leg="decode", in_flight="drop", times=1)
    asking = asyncio.ensure_future(mesh.chat(stream=True))
    await fra.wait_until(lambda: bool(fra.retargets))
    fra.go.set()
    text, _ = await read_text(await asking)
    assert text == answer_text(HELLO, 8)
    assert len(fra.submits) == len(iad.submits) == 1
    await mesh.wait_idle()


async def test_an_old_prefill_node_is_never_retargeted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake fails the test when it hears a word that its version does not know."""
    async with running_mesh(monkeypatch, make_topology(PAIRED), max_version=1) as mesh:
        fra, lhr = mesh.nodes["fra-1"], mesh.nodes["lhr-1"]
        lhr.faults = Faults(leg="decode", in_flight="fail", times=1)
        response = await mesh.chat(stream=True)
        text, _ = await read_text(response)
        assert text == answer_text(HELLO, 8)
        assert fra.retargets == []
        assert [submit.leg for submit in fra.submits] == ["prefill", "prefill"]
        last = (await record_of(mesh, response))["attempts"][-1]
        assert last["recovery"]["kind"] == "resume"  # the first token had been relayed
        await mesh.wait_idle()


async def test_what_a_decode_node_kept_of_a_dead_prefill_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """lhr is slow at prompts, but it holds nearly all of this one."""
    words = "a long prompt " * 850
    topology = make_topology({"fra-1": ("prefill",), "lhr-1": BOTH, "iad-1": BOTH})
    async with running_mesh(monkeypatch, topology) as mesh:
        fra, lhr = mesh.nodes["fra-1"], mesh.nodes["lhr-1"]
        lhr.load = idle_engine(MODEL, prefill_tokens_per_s=250.0)
        lhr.tell(lhr.load_message())
        await mesh.wait_status(lambda nodes: nodes["lhr-1"]["prefill_tokens_per_s"] == 250.0)
        lhr.kept = 2900
        fra.faults = Faults(leg="prefill", drop_after=0, times=1)
        messages = [{"role": "user", "content": words}]
        response = await mesh.chat(messages=messages, stream=True)
        text, _ = await read_text(response)
        assert text == answer_text(ChatInput([ChatTurn("user", words)]), 8)
        first, then = (await record_of(mesh, response))["attempts"]
        assert (first["route"]["prefill"], first["route"]["decode"]) == ("fra-1", "lhr-1")
        assert (then["route"]["prefill"], then["route"]["decode"]) == ("lhr-1", "lhr-1")
        recovery = then["recovery"]
        assert (recovery["kind"], recovery["other_kind"]) == ("salvage", "recompute")
        assert recovery["other_price_s"] > recovery["price_s"] + 1.0
        assert len(lhr.cancels) == 1
        await mesh.wait_idle()


async def test_a_stream_outlives_the_whole_mesh(mesh: RouterMesh) -> None:
    """All nodes go and come back as new incarnations: the client only waits."""
    fra, lhr = mesh.nodes["fra-1"], mesh.nodes["lhr-1"]
    lhr.go.clear()
    response = await mesh.chat(stream=True)
    await lhr.wait_until(lambda: lhr.active == 1)
    for node in mesh.nodes.values():
        await node.stop()
    await mesh.wait_ready(nodes=0)
    for node in mesh.nodes.values():
        await node.start()
    mesh.directory.list(entry_of(node) for node in mesh.nodes.values())
    text, last = await read_text(response)
    assert (text, last[-1]) == (answer_text(HELLO, 8), "[DONE]")
    record = await record_of(mesh, response)
    assert record["attempts"][-1]["route"]["prefill_incarnation"] == "fra-1-2"
    assert fra.submits[-1].forced_ids  # the first token was not computed again
    await mesh.wait_idle()


async def test_twenty_kills_with_progress_in_between_cut_nothing(mesh: RouterMesh) -> None:
    for node in mesh.nodes.values():
        node.answer_tokens = 44  # each attempt relays two: one of prefill, one of decode
        node.faults = Faults(leg="decode", fail_after=1)
    response = await mesh.chat(stream=True)
    text, last = await read_text(response)
    assert (text, last[-1]) == (answer_text(HELLO, 44), "[DONE]")
    assert (await record_of(mesh, response))["attempts"][-1]["number"] > 20
    await mesh.wait_idle()


async def test_a_spent_retry_budget_is_an_overload_not_a_peers_fault(mesh: RouterMesh) -> None:
    for node in mesh.nodes.values():
        node.faults = Faults(leg="prefill", fail_after=0)
    statuses = set()
    while True:
        response = await mesh.chat()
        body = await response.json()
        statuses.add(body["error"]["code"])
        if response.status == 503:
            break
        assert response.status == 502
    assert body["error"]["code"] == "overloaded"
    assert int(response.headers["Retry-After"]) >= 1
    assert "engine_died" in statuses
    for node in mesh.nodes.values():
        node.faults = Faults()
    assert (await mesh.chat()).status == 200  # first attempts are never short of budget
    await mesh.wait_idle()


async def test_a_stream_spends_no_retry_budget(mesh: RouterMesh) -> None:
    for _ in range(2):
        for node in mesh.nodes.values():
            node.answer_tokens = 24
            node.faults = Faults(leg="decode", fail_after=1)
        text, _ = await read_text(await mesh.chat(stream=True))
        assert text == answer_text(HELLO, 24)
    for node in mesh.nodes.values():
        node.faults = Faults(refuse=("overloaded", True))
    response = await mesh.chat()  # four attempts are still in the budget
    assert response.status == 503
    assert (await response.json())["error"]["message"].endswith("told to refuse: overloaded")
    await mesh.wait_idle()


@pytest.mark.parametrize("trouble", ["client error", "abort"])
async def test_clients_never_close_a_node_sglang_9503(mesh: RouterMesh, trouble: str) -> None:
    """sglang PR 9503, 26713: aborts and 4xx of one client opened the circuit for all."""
    fra = mesh.nodes["fra-1"]
    for _ in range(3 * MAX_ATTEMPTS):
        if trouble == "client error":
            response = await mesh.chat(messages=[{"role": "user", "content": "x" * 40_000}])
            assert response.status == 400
            continue
        fra.go.clear()
        asking = asyncio.ensure_future(mesh.chat(stream=True))
        await fra.wait_until(lambda: fra.active == 1)
        asking.cancel()
        await fra.wait_until(lambda: fra.active == 0)
        fra.go.set()
    await mesh.wait_idle()
    assert await metric(mesh, "popmesh_retries_total") == 0
    assert await metric(mesh, "popmesh_router_recoveries_total") == 0
    explained = await mesh.http.post(
        "/popmesh/explain",
        json={"model": MODEL, "messages": [{"role": "user", "content": "hello"}]},
    )
    assert (await explained.json())["rejected"] == []
    response = await mesh.chat()
    assert response.headers["x-popmesh-prefill"] == "fra-1"


async def test_a_dead_engine_is_avoided_until_it_is_ready(mesh: RouterMesh) -> None:
    lhr = mesh.nodes["lhr-1"]
    lhr.go.clear()
    response = await mesh.chat(stream=True)
    await lhr.wait_until(lambda: lhr.active == 1)
    lhr.load = idle_engine(MODEL, ready=False)
    lhr.tell(Failed(lhr.submits[0].stream, "engine_died", "gone", True))
    lhr.tell(Load([lhr.load], [], False))
    text, _ = await read_text(response)
    assert text == answer_text(HELLO, 8)
    assert (await record_of(mesh, response))["attempts"][-1]["route"]["decode"] == "iad-1"
    lhr.load = None
    lhr.tell(lhr.load_message())
    await mesh.wait_status(lambda nodes: nodes["lhr-1"]["ready"])
    lhr.go.set()
    assert (await mesh.chat()).headers["x-popmesh-decode"] == "lhr-1"
    await mesh.wait_idle()


# ---- rebirth -----------------------------------------------------------------------------------


async def test_a_node_reborn_elsewhere_is_linked_at_once(mesh: RouterMesh) -> None:
    """Its old process seems alive (its host froze, packets vanish), but the directory knows."""
    lhr = mesh.nodes["lhr-1"]
    lhr.go.clear()
    response = await mesh.chat(stream=True)
    await lhr.wait_until(lambda: lhr.active == 1)
    reborn = FakeNode("lhr-1", "lhr", lhr.mesh, roles=("decode",), starts=1)
    await reborn.start()
    others = [entry_of(node) for node in mesh.nodes.values() if node is not lhr]
    mesh.directory.list([*others, entry_of(reborn)])
    await reborn.wait_until(lambda: bool(reborn.connections))
    text, last = await read_text(response)
    assert (text, last[-1]) == (answer_text(HELLO, 8), "[DONE]")
    await lhr.wait_until(lambda: not lhr.connections)
    await mesh.wait_idle()
    await reborn.stop()


async def test_a_directory_behind_the_links_cuts_nothing(mesh: RouterMesh) -> None:
    """The router greeted the node's second start before the directory's first word of it came."""
    lhr = mesh.nodes["lhr-1"]
    stale = [entry_of(node) for node in mesh.nodes.values()]
    await lhr.stop()
    await lhr.start()
    await lhr.wait_until(lambda: bool(lhr.connections))
    lhr.starts += 1  # what the directory says next, about a start after this one
    ahead = [entry_of(node) for node in mesh.nodes.values()]
    lhr.starts -= 1
    (connection,) = lhr.connections
    mesh.directory.list(stale)
    mesh.directory.list(ahead)
    assert (await mesh.chat()).status == 200
    assert lhr.connections == [connection]
