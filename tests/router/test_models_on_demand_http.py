"""A whole router with nodes whose models come and go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.request.admission import Limits
from tests.fakes.fake_answer import answer_text
from tests.fakes.fake_node import FakeNode
from tests.router.router_mesh import MODEL, RouterMesh, make_topology, running_mesh
from wire.messages import ChatInput, ChatTurn

BOTH = ("prefill", "decode")
THREE = make_topology({"fra-1": BOTH, "lhr-1": BOTH, "iad-1": BOTH})
SPLIT = make_topology({"fra-1": ("prefill",), "lhr-1": ("decode",)})
HELLO = ChatInput([ChatTurn("user", "hello")])


async def make_cold(mesh: RouterMesh, *names: str, eta_ms: int = 2000) -> list[FakeNode]:
    """These nodes have the model on their disks alone; returns once the router knows."""
    nodes = [mesh.nodes[name] for name in names]
    for node in nodes:
        node.eta_ms = eta_ms
        node.evicted()
    await mesh.wait_status(lambda seen: all(seen[name]["warmth"] == "disk" for name in names))
    return nodes


async def content(response: Any) -> str:
    async with response:
        assert response.status == 200, await response.text()
        return str((await response.json())["choices"][0]["message"]["content"])


async def record_of(mesh: RouterMesh, response: Any) -> Any:
    return await mesh.get_json(f"/popmesh/requests/{response.headers['x-popmesh-request-id']}")


async def test_a_burst_for_a_cold_model_is_answered_by_one_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_mesh(monkeypatch, THREE) as mesh:
        nodes = await make_cold(mesh, "fra-1", "lhr-1", "iad-1")
        asked = [asyncio.ensure_future(mesh.chat()) for _ in range(20)]
        fra = nodes[0]
        await fra.wait_until(lambda: len(fra.waiting) == 20)
        assert [node.loads for node in nodes] == [1, 0, 0]
        fra.loaded()
        answers = [await content(await response) for response in asked]
        assert set(answers) == {answer_text(HELLO, 8)}
        record = await record_of(mesh, asked[0].result())
        (attempt,) = record["attempts"]
        assert attempt["loads"]["fra-1"]["eta_ms"] == 2000
        assert attempt["loads"]["fra-1"]["waited_ms"] > 0
        assert "load" in {reason["term"] for reason in attempt["route"]["reasons"]}
        metrics = await (await mesh.http.get("/metrics")).text()
        assert "popmesh_load_wait_seconds_count 20" in metrics
        await mesh.wait_idle()


async def test_a_split_pair_loads_at_both_ends_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_mesh(monkeypatch, SPLIT) as mesh:
        prefill, decode = await make_cold(mesh, "fra-1", "lhr-1")
        asked = asyncio.ensure_future(mesh.chat())
        await prefill.wait_until(lambda: bool(prefill.warms))
        await decode.wait_until(lambda: bool(decode.submits))
        assert (prefill.loads, decode.loads, prefill.submits) == (1, 1, [])
        assert prefill.warms[0].model == MODEL
        decode.loaded()
        await prefill.wait_until(lambda: bool(prefill.submits))
        transfer = prefill.submits[0].transfer
        assert transfer is not None
        assert (transfer.peer, transfer.address) == ("lhr-1", "127.0.0.1:1")
        prefill.loaded()
        assert await content(await asked) == answer_text(HELLO, 8)
        await mesh.wait_idle()


async def test_a_node_that_dies_while_it_loads_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_mesh(monkeypatch, THREE) as mesh:
        fra, lhr, _ = await make_cold(mesh, "fra-1", "lhr-1", "iad-1")
        asked = asyncio.ensure_future(mesh.chat())
        await fra.wait_until(lambda: bool(fra.waiting))
        await fra.stop()
        await lhr.wait_until(lambda: bool(lhr.submits))
        lhr.loaded()
        assert await content(await asked) == answer_text(HELLO, 8)


async def test_an_estimate_that_slips_past_the_deadline_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from wire.messages import Loading

    async with running_mesh(monkeypatch, THREE) as mesh:
        fra, lhr, _ = await make_cold(mesh, "fra-1", "lhr-1", "iad-1")
        asked = asyncio.ensure_future(mesh.chat())
        await fra.wait_until(lambda: bool(fra.waiting))
        fra.tell(Loading(fra.waiting[0], 3_600_000))
        await lhr.wait_until(lambda: bool(lhr.submits))
        lhr.loaded()
        assert await content(await asked) == answer_text(HELLO, 8)
        record = await record_of(mesh, asked.result())
        assert [attempt["outcome"] for attempt in record["attempts"]] == ["not_loaded", "stop"]
        await mesh.wait_idle()


async def test_nothing_is_loaded_for_a_request_that_cannot_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = Limits(request_timeout_s=5.0, shutdown_s=5.0)
    async with running_mesh(monkeypatch, THREE, limits) as mesh:
        nodes = await make_cold(mesh, "fra-1", "lhr-1", "iad-1", eta_ms=17_300)
        async with await mesh.chat() as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "18"
            error = (await response.json())["error"]
        assert error["code"] == "no_route"
        assert "fra-1: on its disk, 17.3 s to go" in error["message"]
        assert [(node.loads, node.submits) for node in nodes] == [(0, [])] * 3
        # It exists all the same, and a model that would have to be loaded is a route.
        models = await mesh.get_json("/v1/models")
        assert [model["id"] for model in models["data"]] == [MODEL]


async def test_a_node_of_version_2_is_known_by_its_ready_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_mesh(monkeypatch, THREE, max_version=2) as mesh:
        assert await content(await mesh.chat()) == answer_text(HELLO, 8)
        status = await mesh.get_json("/popmesh/status")
        assert {node["engines"][0]["warmth"] for node in status["nodes"]} == {""}


async def test_explain_shows_the_wait_and_status_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_mesh(monkeypatch, THREE) as mesh:
        await make_cold(mesh, "fra-1", "lhr-1", "iad-1")
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        async with mesh.http.post("/popmesh/explain", json=body) as response:
            plan = await response.json()
        (load,) = [r for r in plan["route"]["reasons"] if r["term"] == "load"]
        assert load["seconds"] == pytest.approx(2.0)
        assert load["detail"] == "fra-1: on its disk, 2.0 s to go"
        status = await mesh.get_json("/popmesh/status")
        assert status["routable"] == [MODEL]
        assert {"memory_bytes", "memory_used_bytes"} <= status["nodes"][0].keys()


async def test_a_region_that_keeps_asking_gets_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first requests cross the ocean; meanwhile the model is loaded where they come from."""
    from_iad = {"x-popmesh-client-geo": "38.9,-77.4"}
    async with running_mesh(monkeypatch, THREE) as mesh:
        for node in mesh.nodes.values():
            node.memory_bytes = 10**9
        fra, iad = mesh.nodes["fra-1"], mesh.nodes["iad-1"]
        fra.warmth = "warm"
        fra.loaded()
        await make_cold(mesh, "lhr-1", "iad-1")
        for _ in range(3):
            async with await mesh.chat(from_iad) as response:
                assert response.headers["x-popmesh-prefill"] == "fra-1"
                await response.read()
        await iad.wait_until(lambda: bool(iad.warms))
        assert (iad.warms[0].model, iad.loads, mesh.nodes["lhr-1"].loads) == (MODEL, 1, 0)
        placement = await mesh.get_json("/popmesh/placement")
        assert (placement["warm_per_min"], placement["cool_after_s"]) == (2.0, 300.0)
        (decision,) = placement["decisions"]
        assert (decision["model"], decision["region"]) == (MODEL, "na")
        assert decision["nodes"] == ["iad-1"]
        assert decision["kept_s"] == pytest.approx(300.0, abs=30.0)
        assert "iad-1 has it on its disk" in decision["why"]
        metrics = await (await mesh.http.get("/metrics")).text()
        assert f'popmesh_placement_nodes{{model="{MODEL}",region="na"}} 1' in metrics
        assert "popmesh_placement_warms_total 1" in metrics
        iad.loaded()
        await mesh.wait_status(lambda seen: seen["iad-1"]["ready"])
        async with await mesh.chat(from_iad) as response:
            assert response.headers["x-popmesh-prefill"] == "iad-1"
            await response.read()


async def test_neither_questions_nor_operators_who_choose_nodes_are_demand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_mesh(monkeypatch, THREE) as mesh:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
        for _ in range(5):
            async with mesh.http.post("/popmesh/explain", json=body) as response:
                assert response.status == 200
        pinned = {"x-popmesh-route": "prefill=iad-1,decode=iad-1"}
        for _ in range(5):
            await content(await mesh.chat(pinned))
        assert (await mesh.get_json("/popmesh/placement"))["decisions"] == []
