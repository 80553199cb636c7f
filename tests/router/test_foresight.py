"""What ``explain`` says about accidents: the recoveries that would be chosen, with prices."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.router.router_mesh import MODEL, RouterMesh, make_topology, running_mesh

PAIRED = {"fra-1": ("prefill",), "lhr-1": ("decode",), "iad-1": ("prefill", "decode")}


@pytest.fixture
async def mesh(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RouterMesh]:
    async with running_mesh(monkeypatch, make_topology(PAIRED)) as running:
        yield running


async def explained(mesh: RouterMesh, text: str) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
    async with mesh.http.post("/popmesh/explain", json=body) as response:
        assert response.status == 200
        return await response.json()


async def test_explain_prices_the_loss_of_either_leg(mesh: RouterMesh) -> None:
    plan = await explained(mesh, "a long prompt " * 850)
    assert (plan["route"]["prefill"], plan["route"]["decode"]) == ("fra-1", "lhr-1")
    decode, prefill = plan["if_lost"]
    assert decode["lost"] == "lhr-1, in flight"
    assert decode["choice"]["keeps_prefill"]
    assert decode["choice"]["recovery"]["kind"] == "retarget"
    assert decode["choice"]["recovery"]["other_price_s"] > decode["choice"]["recovery"]["price_s"]
    assert prefill["lost"] == "fra-1, half way"
    assert prefill["choice"]["route"]["prefill"] == "iad-1"
    assert not any(node.submits for node in mesh.nodes.values())


async def test_explain_says_when_a_request_would_wait(mesh: RouterMesh) -> None:
    for name in ("lhr-1", "fra-1"):
        await mesh.nodes[name].stop()
    await mesh.wait_ready(nodes=1)
    (only,) = (await explained(mesh, "hello"))["if_lost"]
    assert only == {"lost": "iad-1", "choice": None}
