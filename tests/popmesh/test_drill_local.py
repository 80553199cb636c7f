"""What a drill sees and does on the machine of the mesh itself, and what it makes of statuses."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from popmesh.drill.drivers import LocalDriver, link_faults
from popmesh.drill.eyes import busy, mesh_seen
from popmesh.drill.faults import FAULTS, Order
from popmesh.drill.ledger import DESCRIPTOR_SLACK, RESIDENT_SLACK_BYTES, leaks
from popmesh.drill.local import Footprint, LocalMesh, footprint
from popmesh.drill.report import Rest
from popmesh.drill.setup import check_permission, routers_of
from popmesh.drill.world import MeshSeen
from popmesh.launcher.ready import (
    EngineStatus,
    NodeAddresses,
    ReadyMesh,
    ReadyNode,
    ReadyRouter,
    ReadyShaper,
    write_ready_file,
)
from popmesh.links.plan import EmulatedLink, LinkFault, LinkPlan
from popmesh.links.plan import write_json as write_plan
from tests.popmesh.fake_doors import MODEL, FakeMesh
from wire.errors import ConfigError, PeerError


def test_leaks_are_more_than_the_slack():
    before = Rest([], {"agent a": Footprint(1, 10, 10**8), "gone": Footprint(2, 1, 1)})
    same = Rest(
        [], {"agent a": Footprint(9, 10 + DESCRIPTOR_SLACK, 10**8), "new": before.processes["gone"]}
    )
    assert leaks(before, same) == []
    more = Footprint(9, 11 + DESCRIPTOR_SLACK, 10**8 + RESIDENT_SLACK_BYTES + 1)
    assert len(leaks(before, Rest([], {"agent a": more}))) == 2


def test_a_process_has_a_footprint():
    mine = footprint(os.getpid())
    assert mine is not None
    assert mine.descriptors >= 3
    assert mine.resident_bytes > 10**6
    assert footprint(2**22 + 1) is None


@pytest.fixture
def local(tmp_path) -> LocalMesh:
    plan = LinkPlan([EmulatedLink("ams", "fra", 10, 100), EmulatedLink("fra", "lhr", 10, 100)], [])
    write_plan(tmp_path / "links.json", plan)

    def node(name: str, site: str) -> ReadyNode:
        engines = [EngineStatus(MODEL, 0, os.getpid())]
        return ReadyNode(name, site, ["decode"], os.getpid(), engines, NodeAddresses("", {}))

    nodes = [node("a", "ams"), node("f1", "fra"), node("f2", "fra"), node("l", "lhr")]
    routers = [ReadyRouter("r", "ams", "http://127.0.0.1:1", os.getpid())]
    shaper = ReadyShaper(str(tmp_path / "links.json"), os.getpid())
    write_ready_file(tmp_path / "ready.json", ReadyMesh("u", "r", nodes, routers, shaper))
    return LocalMesh(tmp_path / "ready.json")


def test_the_ready_file_tells_links_and_processes(local):
    affected = {link.name: link.affected for link in local.links()}
    assert affected == {"ams~fra": {"f1", "f2"}, "fra~lhr": set()}
    assert local.router_pids() == {"http://127.0.0.1:1": os.getpid()}
    assert "engine f1 fake" in local.footprints()


def test_no_ready_file_is_a_refusal(tmp_path):
    with pytest.raises(ConfigError, match="--ready-file"):
        LocalMesh(tmp_path / "none.json").read()
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(ConfigError, match="no ready file"):
        LocalMesh(tmp_path / "odd.json").read()


def test_routers_and_permission(local):
    assert routers_of(None, None, "http://d") == ("http://d",)
    assert routers_of(None, local, "http://d") == ("http://127.0.0.1:1",)
    assert routers_of("http://a/v1, http://b/,http://a", local, "") == ("http://a", "http://b")
    with pytest.raises(ConfigError, match="no routers"):
        routers_of("http://a,", None, "")
    check_permission(["http://127.0.0.1:80", "http://localhost:1", "http://[::1]:2"], None)
    check_permission(["http://10.0.0.5:80"], "key")
    with pytest.raises(ConfigError, match="--operator-key"):
        check_permission(["http://127.0.0.1:80", "http://10.0.0.5:80"], None)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process to harm."""
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait(10)


async def test_a_router_is_killed_by_its_pid(tmp_path, sleeper):
    routers = [ReadyRouter("r", "ams", "http://127.0.0.1:1", sleeper.pid)]
    write_ready_file(tmp_path / "ready.json", ReadyMesh("u", "r", [], routers, None))
    driver = LocalDriver(LocalMesh(tmp_path / "ready.json"))
    await driver.strike(Order(1, FAULTS["kill-router"], "http://127.0.0.1:1", "any"))
    assert sleeper.wait(10) == -signal.SIGKILL
    with pytest.raises(PeerError, match="cannot kill"):
        await driver.strike(Order(2, FAULTS["kill-router"], "http://127.0.0.1:1", "any"))
    with pytest.raises(ConfigError, match="no router at"):
        await driver.strike(Order(3, FAULTS["kill-router"], "http://elsewhere", "any"))
    with pytest.raises(ConfigError, match="not emulated"):
        await driver.strike(Order(4, FAULTS["partition"], "a~b", "any"))


def test_link_faults_in_the_plans_words(local: LocalMesh, tmp_path: Path):
    plan = tmp_path / "links.json"
    both = {("ams", "fra"), ("fra", "ams")}
    for name in ("partition", "slow", "loss"):
        found = link_faults(plan, name, "ams", "fra")
        assert {(fault.from_site, fault.to_site) for fault in found} == both
    assert link_faults(plan, "one-way", "ams", "fra") == (LinkFault("ams", "fra", down=True),)
    assert link_faults(plan, "slow", "ams", "fra")[0].bandwidth_mbps == pytest.approx(1.0)
    assert all(FAULTS[name].duration_s for name in ("partition", "one-way", "slow", "loss"))


def status(mesh: FakeMesh, *nodes: str) -> dict:
    said = [mesh.node(name) for name in nodes]
    return {"mesh": "m", "in_flight": 0, "routable": [MODEL], "nodes": said}


def test_a_node_is_ready_when_every_living_router_says_so():
    mesh = FakeMesh()
    whole = status(mesh, "p1", "d1")
    seen = mesh_seen({"a": whole, "b": whole, "c": None}, {"a": 7}, MODEL, MeshSeen((), ()))
    assert {node.name: node.ready for node in seen.nodes} == {"p1": True, "d1": True}
    assert [(r.name, r.start, r.ready) for r in seen.routers] == [
        ("a", 7, True),
        ("b", 0, True),
        ("c", 0, False),
    ]
    mesh.away.add("d1")
    for other in (status(mesh, "p1", "d1"), status(mesh, "p1")):
        later = mesh_seen({"a": whole, "b": other}, {}, MODEL, seen)
        assert {node.name: node.ready for node in later.nodes} == {"p1": True, "d1": False}
    lost = mesh_seen({"a": status(mesh)}, {}, MODEL, seen)
    assert {node.name: node.ready for node in lost.nodes} == {"p1": False, "d1": False}
    assert lost.nodes[0].roles == {"prefill"}, "what is known of it is kept"


def test_what_is_not_at_rest_is_named_once():
    mesh = FakeMesh(hold_blocks=True)
    held = status(mesh, "p1")
    held["nodes"][0]["engines"][0]["transfers_out"] = 2
    held["in_flight"] = 3
    reserved = {"a": {("popmesh_reservations", ()): 1.0}}
    found = busy({"a": held, "b": status(FakeMesh(), "p1"), "c": None}, reserved)
    assert found == [
        "a: 3 requests in flight",
        "a: 1 reservations",
        "p1 fake: 2 transfers_out",
        "p1 fake: 1 blocks held",
        "c does not answer",
    ]
    assert busy({"b": status(FakeMesh(), "p1")}, {}) == []
