"""A mesh in which one node has the model packed, one has it raw, and one keeps it in 12 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pop_node.store.source import unwatched
from pop_node.store.store import Store
from tests.e2e.hand_mesh import hand_mesh
from tests.e2e.mesh import complete_at

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

MODEL = "smollm2-135m"
ROUTES = [
    *(("raw", "raw"), ("packed", "packed"), ("raw", "packed"), ("packed", "raw")),
    *(("resident", "resident"), ("raw", "resident"), ("resident", "packed")),
]

RESIDENT_GB = 0.58
"""Memory for the model with weights in 12 bits (0.55), not for those in 16 (0.62)."""


def test_it_answers_the_same_whoever_has_which(model_store: Store, tmp_path: Path) -> None:
    packed = Store(tmp_path / "packed")
    bundle = model_store.get(MODEL).path.resolve()
    packed.add(bundle.as_uri(), MODEL, None, unwatched)
    identity = packed.pack(MODEL, progress=unwatched).manifest.identity
    assert packed.get(MODEL).manifest.data.packing is not None
    node = {"site": "ams", "kv_tokens": 2048}
    topology: dict[str, Any] = {
        "mesh": "packed",
        "models": {MODEL: {"digest": identity}},
        "sites": {"ams": {"lat": 52.31, "lon": 4.76, "region": "eu"}},
        "nodes": {
            "raw": dict(node),
            "packed": dict(node),
            "resident": node | {"weights": "resident", "memory_gb": RESIDENT_GB},
        },
        "routers": {"router-ams": {"site": "ams"}},
    }
    stores = {"raw": model_store.root, "packed": packed.root, "resident": packed.root}
    with hand_mesh(tmp_path / "mesh", topology, stores) as mesh:
        answers = {}
        for prefill, decode in ROUTES:
            answer = complete_at(mesh.url, "The capital of France is", 16, prefill, decode)
            assert answer.headers["x-popmesh-decode"] == decode
            answers[prefill, decode] = answer.json()["choices"][0]["text"]
    assert len(set(answers.values())) == 1, answers
    assert "Paris" in answers["raw", "packed"]
