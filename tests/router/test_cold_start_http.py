"""``POST /popmesh/drill`` with a cold start: who may be taken down, and what comes back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from router.http import drill as drill_http
from tests.fakes.fake_node import FakeNode, idle_engine
from tests.router.router_mesh import RouterMesh, running_mesh
from wire.messages import COLD_START, Drill, DrillReport

REPORT = {"model": "fake-model", "node": "iad-1", "total_s": 0.4, "said_s": 0.4, "phases": []}


@pytest.fixture(autouse=True)
def looks_all_the_time(monkeypatch):
    """So that no change of the view is missed, however short."""
    monkeypatch.setattr(drill_http, "LOOK_S", 0.0)


async def ask(mesh: RouterMesh, node: str = "iad-1", **body: Any) -> tuple[int, dict[str, Any]]:
    told = {"node": node, "fault": COLD_START, **body}
    async with mesh.http.post("/popmesh/drill", json=told) as response:
        return response.status, await response.json()


class ColdStart:
    """Lets a fake node take its model down, bring it back and report."""

    def __init__(
        self, mesh: RouterMesh, node: FakeNode, error: str = "", report: bytes | None = None
    ) -> None:
        self.mesh, self.node, self.error = mesh, node, error
        self.report = json.dumps(REPORT).encode() if report is None else report
        self.tasks: list[asyncio.Task[None]] = []
        node.cold_start = lambda drill: self.tasks.append(asyncio.create_task(self.act(drill)))

    async def act(self, drill: Drill) -> None:
        name = self.node.name
        for ready in (False, True):
            self.node.load = idle_engine("fake-model", ready=ready)
            self.node.tell(self.node.load_message())
            await self.mesh.wait_status(lambda e, r=ready: e[name]["ready"] is r)
        report = b"" if self.error else self.report
        self.node.tell(DrillReport(drill.number, report, self.error))


async def test_the_report_comes_back_with_when_the_router_saw_it(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        ColdStart(mesh, mesh.nodes["iad-1"])
        status, said = await ask(mesh, duration_s=90, options={"from": "disk", "libraries": True})
        assert status == 200
        assert {key: said[key] for key in REPORT} == REPORT
        assert said["wall_s"] > 0
        assert said["seen_ready_s"] is not None
        assert said["seen_ready_s"] < REPORT["total_s"] + said["wall_s"]
        (told,) = mesh.nodes["iad-1"].drills
        assert (told.fault, told.model, told.duration_ms) == (COLD_START, "fake-model", 90_000)
        assert json.loads(told.options) == {"from": "disk", "libraries": True}


async def test_a_node_that_fails_says_why(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        ColdStart(mesh, mesh.nodes["iad-1"], error="17 pages stay, process 4 (x) maps them")
        status, said = await ask(mesh)
        assert (status, said["error"]["code"]) == (502, "drill_failed")
        assert "iad-1: 17 pages stay" in said["error"]["message"]


@pytest.mark.parametrize(
    "report", [b"", b"{", b"[1]", b"{}", b'{"said_s": "soon"}', b'{"said_s": 0.4, "x": "\xff"}']
)
async def test_a_report_that_is_none_is_the_nodes_fault(monkeypatch, report):
    async with running_mesh(monkeypatch) as mesh:
        ColdStart(mesh, mesh.nodes["iad-1"], report=report)
        status, said = await ask(mesh)
        assert (status, said["error"]["code"]) == (502, "protocol_error")


async def test_a_node_that_refuses_says_why(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        mesh.nodes["iad-1"].drill_error = "a cold start is running already"
        status, said = await ask(mesh)
        assert (status, said["error"]["code"]) == (409, "drill_refused")
        assert "running already" in said["error"]["message"]


async def test_the_last_one_that_can_answer_is_not_taken_down_unless_told_so(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        del mesh.nodes["lhr-1"].drills[:]
        mesh.nodes["iad-1"].load = idle_engine("fake-model", ready=False)
        mesh.nodes["iad-1"].tell(mesh.nodes["iad-1"].load_message())
        await mesh.wait_status(lambda e: not e["iad-1"]["ready"])
        status, said = await ask(mesh, "lhr-1")  # fra-1 prefills, nobody else decodes
        assert (status, said["error"]["code"]) == (409, "drill_refused")
        assert "without lhr-1 nobody could answer" in said["error"]["message"]
        assert not mesh.nodes["lhr-1"].drills
        ColdStart(mesh, mesh.nodes["lhr-1"])
        assert (await ask(mesh, "lhr-1", alone=True))[0] == 200


async def test_a_node_of_version_2_is_not_asked(monkeypatch):
    async with running_mesh(monkeypatch, max_version=2) as mesh:
        status, said = await ask(mesh)
        assert (status, said["error"]["code"]) == (502, "version_mismatch")
        assert "iad-1 speaks version 2" in said["error"]["message"]
        assert not mesh.nodes["iad-1"].drills


async def test_a_node_that_dies_meanwhile_ends_the_wait(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        node = mesh.nodes["iad-1"]
        node.cold_start = lambda drill: node.connections[0].drop()
        status, said = await ask(mesh)
        assert (status, said["error"]["code"]) == (502, "link_lost")


@pytest.mark.parametrize(
    ("node", "body", "status", "words"),
    [
        ("nowhere", {}, 404, "fra-1"),
        ("iad-1", {"model": "other"}, 400, "iad-1 serves fake-model"),
        ("iad-1", {"duration_s": 3601}, 400, "at most 3600"),
        ("iad-1", {"duration_s": 0}, 400, "duration_s"),
        ("iad-1", {"options": "disk"}, 400, "options"),
    ],
)
async def test_what_cannot_be_held_is_refused_by_name(monkeypatch, node, body, status, words):
    async with running_mesh(monkeypatch) as mesh:
        got, said = await ask(mesh, node, **body)
        assert got == status
        assert words in said["error"]["message"]
        assert not any(fake.drills for fake in mesh.nodes.values())


@pytest.mark.parametrize(
    ("warmth", "status"),
    [("disk", 200), ("warm", 200), ("absent", 409), ("fetching", 409), ("", 409)],
)
async def test_a_model_comes_from_a_peer_only_where_one_has_it(monkeypatch, warmth, status):
    async with running_mesh(monkeypatch) as mesh:
        for name in ("fra-1", "lhr-1"):
            node = mesh.nodes[name]
            node.load = idle_engine("fake-model", warmth=warmth)
            node.tell(node.load_message())
        await mesh.wait_status(lambda e: e["lhr-1"]["warmth"] == e["fra-1"]["warmth"] == warmth)
        ColdStart(mesh, mesh.nodes["iad-1"])
        got, said = await ask(mesh, options={"from": "peer"})
        assert got == status
        if status == 409:
            assert "cannot bring it from a peer" in said["error"]["message"]
            assert not mesh.nodes["iad-1"].drills


class Anew:
    """Lets a fake node start anew as a whole, and tell of it when it is asked."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.tasks: list[asyncio.Task[None]] = []
        node.cold_start = self.told

    def told(self, drill: Drill) -> None:
        if "recall" in json.loads(drill.options):
            self.node.tell(DrillReport(drill.number, json.dumps(REPORT).encode(), ""))
        else:
            self.tasks.append(asyncio.create_task(self.start()))

    async def start(self) -> None:
        await self.node.stop()
        await self.node.start()


async def test_a_whole_node_is_asked_again_when_it_is_back(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        node = mesh.nodes["iad-1"]
        Anew(node)
        status, said = await ask(mesh, options={"whole": True})
        assert status == 200
        assert said["node"] == "iad-1"
        assert said["seen_ready_s"] is not None
        first, second = node.drills
        assert json.loads(second.options) == {"recall": first.number}
        assert node.starts == 2


async def test_a_whole_node_that_does_not_come_back_is_said(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        node = mesh.nodes["iad-1"]
        node.cold_start = lambda drill: mesh.nodes["iad-1"].connections[0].drop()
        status, said = await ask(mesh, options={"whole": True}, duration_s=0.5)
        assert status == 502
        assert "iad-1 did not come back within 0.5 s" in said["error"]["message"]


async def test_a_whole_node_that_stays_says_why(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        node = mesh.nodes["iad-1"]
        node.cold_start = lambda drill: node.tell(DrillReport(drill.number, b"", "no bundle"))
        status, said = await ask(mesh, options={"whole": True})
        assert (status, said["error"]["code"]) == (502, "drill_failed")
        assert "iad-1: no bundle" in said["error"]["message"]
        assert node.starts == 1


async def test_two_drills_do_not_take_down_the_last_two_that_can_answer(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        first, second = mesh.nodes["iad-1"], mesh.nodes["lhr-1"]  # nobody else decodes
        was_told = asyncio.Event()
        first.cold_start = lambda drill: was_told.set()  # it has not said "not ready" yet
        asking = asyncio.create_task(ask(mesh, "iad-1"))
        await was_told.wait()
        status, said = await ask(mesh, "lhr-1")
        assert (status, said["error"]["code"]) == (409, "drill_refused")
        assert "while iad-1 starts cold" in said["error"]["message"]
        assert not second.drills
        status, said = await ask(mesh, "iad-1", alone=True)
        assert (status, said["error"]["code"]) == (409, "drill_refused")
        assert "is starting cold already" in said["error"]["message"]
        (told,) = first.drills
        first.tell(DrillReport(told.number, json.dumps(REPORT).encode(), ""))
        assert (await asking)[0] == 200
        ColdStart(mesh, second)
        assert (await ask(mesh, "lhr-1"))[0] == 200


async def test_a_drill_that_was_refused_stands_in_nobodys_way(monkeypatch):
    async with running_mesh(monkeypatch) as mesh:
        mesh.nodes["iad-1"].drill_error = "no"
        assert (await ask(mesh, "iad-1"))[0] == 409
        ColdStart(mesh, mesh.nodes["lhr-1"])
        assert (await ask(mesh, "lhr-1"))[0] == 200
