"""The launcher with real processes that stand in for the mesh's own: up, crash, down."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from popmesh.client import MeshClient
from popmesh.launcher import local, processes, supervisor
from popmesh.launcher.local import LocalMesh
from popmesh.launcher.plan import Probe, make_plan
from popmesh.launcher.ports import FreePorts
from popmesh.launcher.ready import (
    EngineStatus,
    NodeAddresses,
    NodeStatus,
    read_status,
    told_mistake,
)
from topology.load import parse_topology
from wire.errors import ConfigError, MeshError

MESH = """
mesh: demo
models:
  small: {source: "pypi:x"}
sites:
  fra: {lat: 50.0, lon: 8.6, region: eu}
  lhr: {lat: 51.5, lon: -0.5, region: eu}
nodes:
  p: {site: fra, roles: [prefill]}
  d: {site: lhr, roles: [decode]}
routers:
  r: {site: fra}
"""


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    fake = Path(__file__).with_name("fake_popmesh.py")
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, str(fake)))
    monkeypatch.setattr(supervisor, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(local, "POLL_S", 0.01)
    monkeypatch.setattr(local, "WATCH_S", 0.01)


def local_mesh(tmp_path: Path, text: str = MESH, said: list[str] | None = None) -> LocalMesh:
    topology = parse_topology(text, "mesh.yaml")
    take = FreePorts(random.SystemRandom()).take
    plan = make_plan(topology, tmp_path / "run", tmp_path / "store", take, cores=2)
    say = ([] if said is None else said).append
    return LocalMesh(plan, tmp_path / "logs", tmp_path / "ready.json", None, say)


def ready(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "ready.json").read_text())


def pids(content: dict) -> set[int]:
    nodes = content["nodes"]
    return {n["agent_pid"] for n in nodes} | {e["pid"] for n in nodes for e in n["engines"]}


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """Says which processes that were started since the test began still run."""
    here = psutil.Process()
    before = set(here.children(recursive=True))  # a registry that other tests share
    return lambda: [c for c in set(here.children(recursive=True)) - before if alive(c.pid)]


async def test_up_says_who_runs_and_down_leaves_nobody(tmp_path, children):
    mesh, phases = local_mesh(tmp_path), []
    (tmp_path / "ready.json").write_text("from an earlier run")
    async with asyncio.timeout(60):
        async with mesh.serving(lambda phase, done, total: phases.append((phase, done, total))):
            content = ready(tmp_path)
            running = children()
            assert content["router_url"] == mesh.plan.router_url
            assert content["registry_url"] == mesh.plan.registry_url
            assert [(n["name"], n["site"], n["roles"]) for n in content["nodes"]] == [
                ("p", "fra", ["prefill"]),
                ("d", "lhr", ["decode"]),
            ]
            assert content["nodes"][0]["engines"][0].keys() == {"model", "rank", "pid"}
            assert content["nodes"][0]["addresses"]["kv"] == {"small": "127.0.0.1:2"}
            assert all(alive(pid) for pid in pids(content))
            assert len(running) == 7  # registry, links, 2 nodes with an engine each, router
    assert not children()
    assert not (tmp_path / "ready.json").exists()
    assert phases[-1] == ("probes", 2, 2)


async def test_a_node_that_dies_comes_back_and_the_ready_file_says_so(tmp_path):
    async with asyncio.timeout(60), local_mesh(tmp_path).serving(lambda *_: None):
        before = ready(tmp_path)
        victim = before["nodes"][0]
        os.kill(victim["agent_pid"], signal.SIGKILL)
        while (after := ready(tmp_path)) == before:  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.01)
        assert after["nodes"][0]["agent_pid"] != victim["agent_pid"]
        assert after["nodes"][1] == before["nodes"][1]
        assert not alive(victim["engines"][0]["pid"]), "its engine was left behind"


async def test_a_refused_configuration_ends_the_start_with_the_childs_words(tmp_path, children):
    mesh = local_mesh(tmp_path, MESH.replace("  d: ", "  refuse: "))
    with pytest.raises(BaseExceptionGroup) as caught:
        async with asyncio.timeout(60), mesh.serving(lambda *_: None):
            pytest.fail("it started")
    assert caught.group_contains(ConfigError, match="not in the store")
    assert not children()


async def test_what_a_node_tries_again_is_said_once(tmp_path):
    said: list[str] = []
    looks: list[str] = []

    class EnoughError(Exception):
        pass

    def report(phase: str, done: int, total: int) -> None:
        looks.extend([phase] if said else [])
        if len(looks) == 20:
            raise EnoughError

    mesh = local_mesh(tmp_path, MESH.replace("  d: ", "  waiting: "), said)
    with pytest.raises(BaseExceptionGroup) as caught:
        async with asyncio.timeout(60), mesh.serving(report):
            pytest.fail("it started")
    assert caught.group_contains(EnoughError)
    assert said == ["node waiting has no small yet: the disk is full"]


async def test_why_no_token_comes_is_said_once_after_a_while(tmp_path, monkeypatch):
    asked: list[Probe] = []

    async def probe_once(client: MeshClient, probe: Probe) -> str:
        asked.append(probe)
        return "" if said and len(asked) > 8 else "no node can"

    monkeypatch.setattr(local, "_probe_once", probe_once)
    monkeypatch.setattr(local, "PROBE_QUIET_S", 0.2)
    monkeypatch.setattr(local, "PROBE_RETRY_S", 0.01)
    said: list[str] = []
    async with asyncio.timeout(60), local_mesh(tmp_path, said=said).serving(lambda *_: None):
        pass
    assert said == ["node p does not answer for small: no node can"]
    assert len(asked) > 8


async def test_a_cancelled_start_leaves_nobody(tmp_path, monkeypatch, children):
    forever = lambda *_: asyncio.get_running_loop().create_future()  # noqa: E731
    monkeypatch.setattr(local, "_probe_once", forever)
    up = asyncio.Event()

    async def start() -> None:
        async with local_mesh(tmp_path).serving(lambda phase, *_: phase == "probes" and up.set()):
            pytest.fail("it started")

    task = asyncio.create_task(start())
    await asyncio.wait_for(up.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not children()


async def test_an_error_inside_ends_the_mesh_too(tmp_path, children):
    with pytest.raises(BaseExceptionGroup) as caught:
        async with asyncio.timeout(60), local_mesh(tmp_path).serving(lambda *_: None):
            raise MeshError("the sample failed")
    assert caught.group_contains(MeshError, match="the sample failed")
    assert not children()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"agent_pid": 7}'])
def test_a_status_file_that_is_not_whole_says_nothing(tmp_path, content):
    path = tmp_path / "status.json"
    assert read_status(path, 7) is None
    path.write_text(content)
    assert read_status(path, 7) is None


def test_a_status_file_of_an_earlier_process_says_nothing(tmp_path):
    path = tmp_path / "status.json"
    status = {"agent_pid": 7, "ready": True, "engines": [], "addresses": {"mesh": "", "kv": {}}}
    path.write_text(json.dumps(status))
    assert read_status(path, 8) is None
    assert read_status(path, None) is None
    assert read_status(path, 7) is not None
    path.write_text(json.dumps(status | {"ready": False}))
    told = read_status(path, 7)
    assert told is not None
    assert not told.ready


@pytest.mark.parametrize(
    ("last_words", "mistake"),
    [("", None), ("OSError: x: y", None), ("ConfigError: no: not ever", "small: no: not ever")],
)
def test_a_setting_that_cannot_be_is_told_from_bad_luck(last_words, mistake):
    engine = EngineStatus("small", 0, None, last_words)
    assert told_mistake(NodeStatus(7, False, [engine], NodeAddresses("", {}))) == mistake


async def test_a_mesh_whose_engine_can_never_start_is_not_waited_for(tmp_path, children):
    mesh = local_mesh(tmp_path, MESH.replace("  d: ", "  mistaken: "))
    with pytest.raises(BaseExceptionGroup) as caught:
        async with asyncio.timeout(60), mesh.serving(lambda *_: None):
            raise AssertionError("it became ready")
    expected = "node mistaken cannot serve small: weights 'resident' cannot be used"
    assert caught.group_contains(ConfigError, match=expected)
    assert not children()


LAUNCHER = """
import asyncio, sys
from pathlib import Path
from popmesh.launcher.plan import Child
from popmesh.launcher.processes import ChildProcess
from topology.model import Address
arguments = ("registry", "--listen", sys.argv[1])
child = Child("registry", "registry", arguments, Address("127.0.0.1", 1))
process = ChildProcess(child, Path(sys.argv[2]), print)
async def main():
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(process.run())
        while "serving" not in Path(sys.argv[2]).read_text():
            await asyncio.sleep(0.02)
        print(process.pid, flush=True)
Path(sys.argv[2]).touch()
asyncio.run(main())
"""


def test_children_die_with_a_launcher_that_is_killed(tmp_path):
    port = FreePorts(random.SystemRandom()).take()
    arguments = [f"127.0.0.1:{port}", str(tmp_path / "log")]
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *arguments], stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        child = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
        psutil.wait_procs([child], timeout=20)
        assert not alive(child.pid)
