"""Clients make mistakes or leave, and healthy nodes are taken out of use for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.router.router_mesh import RouterMesh

TOO_LONG = [{"role": "user", "content": "x" * 40_000}]

BAD_REQUESTS: dict[str, dict[str, Any]] = {
    "longer than the context, which only nodes can tell": {"messages": TOO_LONG},
    "a parameter that is not supported": {"logprobs": True},
    "a value of the wrong type": {"temperature": "warm"},
}


async def assert_fully_used(mesh: RouterMesh) -> None:
    """The best pair serves everything, at the first attempt."""
    for _ in range(20):
        response = await mesh.chat()
        assert response.status == 200
        pair = response.headers["x-popmesh-prefill"], response.headers["x-popmesh-decode"]
        assert pair == ("fra-1", "lhr-1")
        await response.read()
    assert "popmesh_retries_total 0" in await (await mesh.http.get("/metrics")).text()
    await mesh.wait_idle()


@pytest.mark.parametrize("what", BAD_REQUESTS)
async def test_sglang_9503_and_26713_bad_requests_open_no_circuit(
    mesh: RouterMesh, what: str
) -> None:
    """sgl-project/sglang 9503 and 26713: 400s for prompts over the context length counted as
    failures of the node that said them, its circuit breaker opened, and good requests found no
    available worker. 200 bad requests must leave the mesh as it was."""
    for _ in range(10):
        responses = await asyncio.gather(*(mesh.chat(**BAD_REQUESTS[what]) for _ in range(20)))
        assert {response.status for response in responses} <= {400, 422}
    await assert_fully_used(mesh)


async def test_sglang_9503_and_26713_clients_that_leave_open_no_circuit(
    one_pair: RouterMesh,
) -> None:
    """The same breakers counted clients that hung up in mid-stream (sgl-project/sglang 9503 and
    26713, and what was found beside them). 200 of them, half before the first token and half after
    it, leave the mesh as it was."""
    mesh = one_pair
    fra, lhr = mesh.nodes["fra-1"], mesh.nodes["lhr-1"]
    for _ in range(5):
        fra.go.clear()
        early = [asyncio.ensure_future(mesh.chat(stream=True)) for _ in range(20)]
        await fra.wait_until(lambda: fra.active == 20)
        for each in early:
            each.cancel()
        await fra.wait_until(lambda: fra.active == 0)
        fra.go.set()
        lhr.go.clear()
        late = await asyncio.gather(*(mesh.chat(stream=True) for _ in range(20)))
        for response in late:
            assert response.status == 200
            response.close()
        await lhr.wait_until(lambda: lhr.active == 0)
        lhr.go.set()
    await mesh.wait_idle()
    await assert_fully_used(mesh)
