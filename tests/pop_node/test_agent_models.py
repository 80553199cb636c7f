"""Models that come and go on real nodes with real engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from pop_node.residency import events as ev
from pop_node.residency import reserve
from pop_node.residency.residency import Residency
from pop_node.store import layout
from pop_node.store.store import Store
from tests.pop_node.drills.page_world import disk_folder
from tests.pop_node.hand_router import MODEL, WAIT_S, HandRouter
from tests.pop_node.node_mesh import TinyMesh, tiny_mesh, topology, write_store
from topology.budget import ENGINE_BYTES, GB
from topology.model import Model, Topology
from wire.messages import (
    Drill,
    DrillReport,
    EngineLoad,
    Failed,
    Finished,
    Hello,
    Loading,
    ModelOffer,
    Offers,
    Refused,
    Warm,
)

A, B, C = "one", "two", "three"
ONE = 1.2 * ENGINE_BYTES / GB
TWO = 2.2 * ENGINE_BYTES / GB
"""Memory for so many of the tiny models, which take hardly more than their engines."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One model under three more names: three models to a node."""
    return three_models(tmp_path_factory.mktemp("models"))


def three_models(root: Path) -> Store:
    store = write_store(root)
    for name in (A, B, C):
        store.add(str(root / "source"), name, "float32", lambda phase, done, total: None)
    return store


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve, "FILL_AFTER_S", 0.0)


def a_plan(memory_gb: float | None, *pinned: str, names: tuple[str, ...] = ("a",)) -> Topology:
    plan = topology(*names)
    models = {name: Model(name, dtype="float32") for name in (A, B, C)}
    nodes = {
        name: replace(node, models=(A, B, C), memory_gb=memory_gb, pinned=pinned)
        for name, node in plan.nodes.items()
    }
    return replace(plan, models=models, nodes=nodes)


def engine(router: HandRouter, model: str) -> EngineLoad:
    assert router.load is not None
    return next(each for each in router.load.engines if each.model == model)


def warmth(router: HandRouter) -> dict[str, str]:
    assert router.load is not None
    return {each.model: each.warmth for each in router.load.engines}


def waits(router: HandRouter, stream: int) -> bool:
    return any(isinstance(m, Loading) and m.stream == stream for m in router.said)


async def answer(mesh: TinyMesh, model: str) -> list[int]:
    stream = mesh.whole("a", model=model)
    ending = await mesh.routers["a"].ending(stream)
    assert isinstance(ending, Finished), ending
    return mesh.answer(stream)


async def test_a_model_that_is_asked_for_takes_the_place_of_an_idle_one(
    store: Store, tmp_path: Path
) -> None:
    async with tiny_mesh(store, tmp_path, "a", plan=a_plan(TWO, B), version=3) as mesh:
        a = mesh.routers["a"]
        assert warmth(a) == {A: "warm", B: "warm", C: "disk"}
        assert a.hello is not None
        assert [offer.name for offer in a.hello.models] == [A, B, C]
        cold = engine(a, C)
        assert not cold.ready
        assert cold.eta_ms > 0
        assert cold.memory_bytes > ENGINE_BYTES
        expected = await answer(mesh, A)

        stream = mesh.whole("a", model=C)
        await a.until(lambda: waits(a, stream))
        assert isinstance(await a.ending(stream), Finished)
        assert mesh.answer(stream) == expected
        await a.until(lambda: warmth(a) == {A: "disk", B: "warm", C: "warm"})
        assert engine(a, C).last_load_ms > 0
        assert a.load is not None
        assert 0 < a.load.memory_used_bytes <= a.load.memory_bytes == round(TWO * GB)
        # Its place in the offer was right before it was ever loaded, but for the port.
        offers = next(m for m in reversed(a.said) if isinstance(m, Offers))
        for before, now in zip(a.hello.models, offers.models, strict=True):
            assert without_address(before) == without_address(now)
        assert all(offer.kv_address for offer in offers.models)
        # Back again, in the process that stands by; the pinned one never left.
        standby = mesh.nodes["a"].agent._residents._reserve._standby
        assert standby is not None
        await standby.fill()
        waiting, pinned = standby.pid, mesh.nodes["a"].status["engines"][1]["pid"]
        assert await answer(mesh, A) == expected
        pids = [each["pid"] for each in mesh.nodes["a"].status["engines"]]
        assert pids[:2] == [waiting, pinned]
        await mesh.at_rest()
    assert not psutil.Process().children(recursive=True)


def without_address(offer: ModelOffer) -> ModelOffer:
    return msgspec.structs.replace(offer, kv_address="")


async def test_one_models_crash_leaves_the_others_serving(store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(store, tmp_path, "a", plan=a_plan(TWO), version=3) as mesh:
        a, node = mesh.routers["a"], mesh.nodes["a"]
        running = mesh.whole("a", model=B, max_tokens=400)
        await a.until(lambda: a.tokens.get(running))
        os.kill(node.engine["pid"], signal.SIGKILL)
        await a.until(lambda: not engine(a, A).ready)
        parked = mesh.whole("a", model=A)
        await a.until(lambda: waits(a, parked))
        assert isinstance(await a.ending(parked), Finished)
        assert isinstance(await a.ending(running), Finished)
        assert len(mesh.answer(running)) == 400
        await mesh.at_rest()


async def test_a_model_in_use_or_held_does_not_leave(store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(store, tmp_path, "a", plan=a_plan(ONE), version=3) as mesh:
        a = mesh.routers["a"]
        running = mesh.whole("a", model=A, max_tokens=400)
        await a.until(lambda: a.tokens.get(running))
        refused = await a.ending(mesh.whole("a", model=B))
        assert isinstance(refused, Refused)
        assert (refused.code, refused.retryable) == ("not_loaded", True)
        assert refused.retry_after_ms > 0
        assert isinstance(await a.ending(running), Finished)
        # A lease keeps it in memory too, and one for another model brings that when it has ended.
        a.send(Warm(A, 60_000))
        refused = await a.ending(mesh.whole("a", model=B))
        assert isinstance(refused, Refused)
        assert 0 < refused.retry_after_ms <= 60_000
        await a.until(lambda: engine(a, B).warm_refused)
        assert len(await answer(mesh, A)) == 8


async def test_a_router_warms_a_model_ahead(store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(store, tmp_path, "a", plan=a_plan(ONE), version=3) as mesh:
        a = mesh.routers["a"]
        a.send(Warm("nobody's", 60_000))
        a.send(Warm(C, 60_000))
        await a.until(lambda: warmth(a) == {A: "disk", B: "disk", C: "warm"})
        stream = mesh.whole("a", model=C)
        assert isinstance(await a.ending(stream), Finished)
        assert not waits(a, stream)


async def test_whoever_waits_for_a_model_can_change_their_mind(
    store: Store, tmp_path: Path
) -> None:
    async with tiny_mesh(store, tmp_path, "a", plan=a_plan(ONE), version=3) as mesh:
        a, node = mesh.routers["a"], mesh.nodes["a"]
        streams = [mesh.whole("a", model=B) for _ in range(3)]
        await a.until(lambda: waits(a, streams[2]))
        mesh.cancel(streams[0], "a")
        cancelled = await a.ending(streams[0])
        assert isinstance(cancelled, Finished)
        assert cancelled.reason == "cancelled"
        gone = await mesh.greet("a", 3)
        lost = mesh.whole("a", model=B)
        await gone.until(lambda: waits(gone, lost))
        await gone.close()
        mesh.routers["a"] = a
        for stream in streams[1:]:
            assert isinstance(await a.ending(stream), Finished)
        await a.until(lambda: warmth(a)[B] == "warm")
        assert len(node.agent._residents.parking) == 0
        # Too short a time to load anything: told at once, but whoever comes back finds it.
        refused = await a.ending(mesh.whole("a", model=C, deadline_remaining_ms=20))
        assert isinstance(refused, Refused | Failed)
        await a.until(lambda: warmth(a)[C] == "warm")


async def test_a_drain_refuses_those_who_wait(store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(store, tmp_path, "a", plan=a_plan(ONE), version=3) as mesh:
        a = mesh.routers["a"]
        stream = mesh.whole("a", model=B)
        await a.until(lambda: waits(a, stream))
        mesh.nodes["a"].agent.drain()
        refused = await a.ending(stream)
        assert isinstance(refused, Refused)
        assert (refused.code, refused.retryable) == ("draining", True)


async def test_older_routers_hear_that_it_is_not_ready(store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(store, tmp_path, "a", plan=a_plan(ONE), version=2) as mesh:
        a = mesh.routers["a"]
        assert a.load is not None
        assert [each.ready for each in a.load.engines] == [True, False, False]
        refused = await a.ending(mesh.whole("a", model=B))
        assert isinstance(refused, Refused)
        assert (refused.code, refused.retryable) == ("not_ready", True)
        assert len(await answer(mesh, A)) == 8
        assert not any(isinstance(m, Loading | Offers) for m in a.said)


async def test_a_missing_model_comes_from_a_node_that_has_it(store: Store, tmp_path: Path) -> None:
    plan = topology("a", "b")
    empty = replace(plan.nodes["b"], store=tmp_path / "empty", memory_gb=ONE)
    plan = replace(plan, nodes={"a": plan.nodes["a"], "b": empty})
    async with tiny_mesh(store, tmp_path, "a", "b", plan=plan, version=3) as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        await b.until(lambda: warmth(b) == {MODEL: "warm"})  # there is room: nobody has to ask
        stream = mesh.whole("b")
        assert isinstance(await b.ending(stream), Finished)
        # It is said when it is ready, or in the Hello of a link that was not there before that.
        told = (Hello, Offers)
        await b.until(lambda: [o.name for m in b.said if isinstance(m, told) for o in m.models])
        assert [offer.name for offer in mesh.nodes["b"].agent.hello().models] == [MODEL]
        whole = mesh.whole("a")
        await a.ending(whole)
        assert a.tokens[whole] == b.tokens[stream]
        assert Store(tmp_path / "empty").get(MODEL).manifest.bundle == (
            store.get(MODEL).manifest.bundle
        )


async def test_a_cold_start_is_reported(tmp_path: Path) -> None:
    plan = a_plan(None)
    plan = replace(plan, nodes={"a": replace(plan.nodes["a"], models=(A,))})
    with disk_folder(tmp_path) as folder:
        async with tiny_mesh(three_models(folder), tmp_path, "a", plan=plan, version=3) as mesh:
            a = mesh.routers["a"]
            pid = mesh.nodes["a"].engine["pid"]
            a.send(Drill(7, "cold-start", A, 60_000, "{}"))
            (report,) = await a.until(lambda: [m for m in a.said if isinstance(m, DrillReport)])
            assert report.error == ""
            told = json.loads(report.report)
            assert {"imports", "load", "first_token"} <= {phase["name"] for phase in told["phases"]}
            assert mesh.nodes["a"].engine["pid"] != pid
            assert len(await answer(mesh, A)) == 8


async def test_a_model_goes_down_for_a_drill_after_its_legs(store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(store, tmp_path, "a", plan=a_plan(TWO), version=3) as mesh:
        a, host = mesh.routers["a"], mesh.nodes["a"].agent._cold_starts._host
        assert host.problem(A) == ""
        assert "disk" in host.problem(C)
        assert host.problem("other")
        running = mesh.whole("a", model=A, max_tokens=200)
        await a.until(lambda: a.tokens.get(running))
        async with asyncio.timeout(WAIT_S):
            await host.take_down(A)
        assert isinstance(await a.ending(running), Finished)
        assert len(mesh.answer(running)) == 200
        assert host.engine_pid(A) is None
        refused = await a.ending(mesh.whole("a", model=A))
        assert isinstance(refused, Refused)
        assert refused.code == "not_loaded"
        refused = await a.ending(mesh.whole("a", model=C, deadline_remaining_ms=60_000))
        assert not isinstance(refused, Failed)
        async with asyncio.timeout(WAIT_S):
            spans = await host.start(A, "disk")
        assert "imports" in [span[0] for span in spans]
        assert len(await answer(mesh, A)) == 8


async def test_an_engine_begins_before_all_of_its_model_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4096)
    full = write_store(tmp_path / "full")
    plan = topology("a", "b")
    giver = replace(plan.nodes["a"], give_mbps=1.0)  # half a megabyte takes seconds
    taker = replace(plan.nodes["b"], store=tmp_path / "empty", memory_gb=ONE, pinned=(MODEL,))
    plan = replace(plan, nodes={"a": giver, "b": taker})
    async with tiny_mesh(full, tmp_path, "a", "b", plan=plan, version=3) as mesh:
        b, held = mesh.routers["b"], mesh.nodes["b"].agent._residents
        async with asyncio.timeout(WAIT_S):
            await held.until(lambda: held.standing.state(MODEL).memory == "loading")
        assert held.standing.state(MODEL).disk == "fetching"
        await b.until(lambda: warmth(b) == {MODEL: "warm"})
        stream = mesh.whole("b")
        assert isinstance(await b.ending(stream), Finished)
        async with asyncio.timeout(WAIT_S):
            await held.until(lambda: held.standing.state(MODEL).disk == "here")
        os.kill(mesh.nodes["b"].engine["pid"], signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            await held.until(lambda: held.standing.state(MODEL).memory == "loading")
            await held.until(lambda: held.standing.state(MODEL).memory == "warm")
        assert isinstance(await b.ending(mesh.whole("b")), Finished)


async def test_a_model_beyond_the_disk_is_fetched_when_it_is_asked_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = topology("a", "b")
    full = replace(plan.nodes["b"], store=tmp_path / "empty", memory_gb=ONE, disk_gb=1e-6)
    plan = replace(plan, nodes={"a": plan.nodes["a"], "b": full})
    put_off = asyncio.Event()
    handle = Residency.handle

    def listen(machine: Residency, event: ev.Event, now: float) -> list[ev.Effect]:
        if isinstance(event, ev.PutOff):
            put_off.set()
        return handle(machine, event, now)

    monkeypatch.setattr(Residency, "handle", listen)
    async with tiny_mesh(store, tmp_path, "a", "b", plan=plan, version=3) as mesh:
        b = mesh.routers["b"]
        async with asyncio.timeout(WAIT_S):
            await put_off.wait()
        stream = mesh.whole("b", deadline_remaining_ms=300_000)
        await b.until(lambda: waits(b, stream))
        assert isinstance(await b.ending(stream), Finished)
