"""A model is taken down, made cold and started in a mesh that goes on serving: real pages, real
processes, the real model."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from pop_node.drills.pages import resident_pages
from pop_node.store.store import Store
from tests.e2e.mesh import Mesh, start_mesh
from tests.pop_node.drills.page_world import disk_folder

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

MODEL = "smollm2-135m"
NODE, OTHER = "fra-1", "ord-1"

TOPOLOGY = """
mesh: cold
models:
  {model}: {{source: "{source}"}}
sites:
  fra: {{lat: 50.03, lon: 8.57, region: eu}}
  ord: {{lat: 41.98, lon: -87.90, region: na}}
nodes:
  fra-1: {{site: fra, kv_tokens: 4096, store: {stores}/fra-1, disk_gb: 2}}
  ord-1: {{site: ord, kv_tokens: 4096, store: {stores}/ord-1, disk_gb: 2}}
routers:
  router-fra: {{site: fra, listen: "127.0.0.1:0"}}
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with disk_folder(tmp_path_factory.mktemp("cold")) as path:
        yield path


@pytest.fixture(scope="module")
def cold_mesh(model_store: Store, directory: Path) -> Iterator[Mesh]:
    """Two nodes, each with the model in a store of its own."""
    source = f"file://{model_store.get(MODEL).path.resolve()}"
    for node in (NODE, OTHER):
        Store(directory / node).add(source, MODEL, None, lambda *_: None)
    topology = directory / "cold.yaml"
    topology.write_text(TOPOLOGY.format(model=MODEL, source=source, stores=directory))
    mesh = start_mesh(topology, model_store.root, directory / "mesh")
    yield mesh
    mesh.stop()


def cold_start(mesh: Mesh, directory: Path, *options: str) -> tuple[int, Any, str]:
    """``popmesh drill cold-start``: exit code, what it printed as JSON, and its last words."""
    command = [sys.executable, "-m", "popmesh", "drill", "cold-start", "--mesh", mesh.url]
    command += ["--report", str(directory / "drills"), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def bundle_files(directory: Path, node: str) -> list[Path]:
    return sorted(Store(directory / node).get(MODEL).path.iterdir())


class Client:
    """Asks the mesh all the time; ``with`` it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.texts: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        body = {"model": MODEL, "prompt": "The harbour was", "max_tokens": 4, "temperature": 0}
        while not self._over.is_set():
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
            self.texts.append(answer.raise_for_status().json()["choices"][0]["text"])

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join(60)


def test_from_disk_nothing_of_the_model_is_in_memory_and_others_serve(
    cold_mesh: Mesh, directory: Path
):
    files = bundle_files(directory, NODE)
    for path in files:
        path.read_bytes()
    pages = sum(resident_pages(path).resident for path in files)
    agent, engine = cold_mesh.pids(NODE)
    with Client(cold_mesh.url) as client:
        code, report, said = cold_start(
            cold_mesh, directory, "--node", NODE, "--runs", "2", "--budget", "2m"
        )
    assert code == 0, said
    assert report["passed"]
    first, second = report["runs"]
    assert first["cold"]["model"]["resident_before"] == pages
    for run in (first, second):
        assert run["cold"]["model_pages"] == sum(resident_pages(path).pages for path in files)
        assert run["cold"]["model_pages_resident"] == 0
        ends = {phase["name"]: phase["end_s"] for phase in run["phases"]}
        order = ("process_start", "imports", "first_token", "ready")
        assert sorted(order, key=ends.__getitem__) == list(order)
        assert 0 < ends["read"] <= ends["ready"]
        read = next(phase for phase in run["phases"] if phase["name"] == "read")
        assert read["bytes"] > 0.9 * run["bundle_bytes"]
        assert ends["ready"] <= run["time_s"] < 120
        assert run["seen_ready_s"] is not None
    assert psutil.pid_exists(agent), "the agent stayed"
    assert not psutil.pid_exists(engine), "the model is in another process"
    assert len(client.texts) > 0
    assert len(set(client.texts)) == 1, "every answer is right, and the same"
    page = (directory / "drills" / "report.html").read_text()
    assert page.count("<svg") == 2
    history = directory / "drills" / "history" / "cold" / MODEL / f"{NODE}.jsonl"
    assert len(history.read_text().splitlines()) == 2


def test_libraries_are_dropped_as_far_as_nobody_maps_them(cold_mesh: Mesh, directory: Path):
    code, report, said = cold_start(cold_mesh, directory, "--node", NODE, "--libraries")
    assert code == 0, said
    (run,) = report["runs"]
    cold = run["cold"]
    assert cold["library_pages"] > 10_000
    assert cold["library_pages_resident"] < cold["library_pages"]
    holders = [holder["pid"] for holder in cold["libraries"]["holders"]]
    assert cold_mesh.pids(OTHER)[1] in holders or len(holders) == 16, "the other engine maps torch"
    assert cold["model_pages_resident"] == 0


@pytest.mark.parametrize("source", ["peer", "origin"])
def test_from_elsewhere_the_model_is_fetched_again(cold_mesh: Mesh, directory: Path, source: str):
    path = Store(directory / NODE).get(MODEL).path
    inode = (path / "manifest.json").stat().st_ino
    code, report, said = cold_start(cold_mesh, directory, "--node", NODE, "--from", source)
    assert code == 0, said
    (run,) = report["runs"]
    phases = {phase["name"]: phase for phase in run["phases"]}
    assert phases["fetch"]["bytes"] > 0.9 * run["bundle_bytes"]
    assert phases["fetch"]["end_s"] <= phases["first_token"]["end_s"]
    assert run["cold"]["model"] is None
    store = Store(directory / NODE)
    store.verify(MODEL)
    assert (store.get(MODEL).path / "manifest.json").stat().st_ino != inode, "a new copy"
    assert list((directory / NODE / "tmp").iterdir()) == []


def test_a_site_is_all_its_nodes_and_a_budget_can_be_missed(cold_mesh: Mesh, directory: Path):
    code, report, said = cold_start(cold_mesh, directory, "--site", "ord", "--budget", "0.01s")
    assert code == 1, said
    assert report["nodes"] == [OTHER]
    assert "took longer than 0.01 s" in report["problems"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--node", "nobody"), "no node is called 'nobody' (known: fra-1, ord-1)"),
        (("--site", "mars"), "no node is at site 'mars' (known: fra, ord)"),
        (("--node", NODE, "--model", "gpt"), "serves smollm2-135m"),
    ],
)
def test_what_cannot_be_held_is_said(
    cold_mesh: Mesh, directory: Path, options: tuple[str, ...], words: str
):
    code, report, said = cold_start(cold_mesh, directory, *options)
    assert code == 2
    assert report is None
    assert words in said


def test_a_whole_node_starts_anew_under_the_same_process_id(cold_mesh: Mesh, directory: Path):
    agent, engine = cold_mesh.pids(NODE)
    options = ("--node", NODE, "--whole", "--libraries", "--budget", "2m")
    code, report, said = cold_start(cold_mesh, directory, *options)
    assert code == 0, said
    (run,) = report["runs"]
    assert run["cold"]["model_pages_resident"] == 0
    assert run["cold"]["library_pages"] > 10_000
    ends = {phase["name"]: phase["end_s"] for phase in run["phases"]}
    order = ("agent", "process_start", "imports", "first_token", "in the plan")
    assert sorted(order, key=ends.__getitem__) == list(order)
    assert psutil.pid_exists(agent), "whoever keeps the node running saw nothing end"
    assert not psutil.pid_exists(engine)
    code, report, said = cold_start(cold_mesh, directory, "--node", NODE)
    assert code == 0, said
