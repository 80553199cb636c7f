"""Labels that clients choose, until the metrics outweigh the router."""

from __future__ import annotations

import asyncio
import re

from tests.router.router_mesh import RouterMesh

_SAMPLE = re.compile(r"^([a-z_]+(\{.*\})?) [0-9.e+-]+$", re.M)
WAYS = 7


async def series_of(mesh: RouterMesh) -> set[str]:
    """Names and labels of all samples, without their values."""
    text = await (await mesh.http.get("/metrics")).text()
    return {match.group(1) for match in _SAMPLE.finditer(text)}


async def strange_request(mesh: RouterMesh, number: int) -> None:
    """One request in which the client chooses something that nobody ever chose before."""
    name = f"strange-{number}"
    body = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}]}
    headers: dict[str, str] = {}
    method, path = "POST", "/v1/chat/completions"
    match number % WAYS:
        case 0:
            body["model"] = name
        case 1:
            headers = {
                "x-request-id": name,
                "user-agent": name,
                "x-popmesh-tenant": name,
                "x-session-affinity": name,
                f"x-{name}": name,
            }
            body |= {"user": name, "metadata": {name: name}, "max_tokens": 1}
        case 2:
            method, path = "GET", f"/{name}"
        case 3:
            method, path = "GET", f"/v1/models/{name}"
        case 4:
            method = f"STRANGE{number}"
        case 5:
            body[name] = 1
        case _:
            headers = {"x-popmesh-route": f"prefill={name}"}
    response = await mesh.http.request(method, path, json=body, headers=headers)
    assert response.status < 500
    await response.read()


async def test_llm_d_1909_and_2119_clients_cannot_make_series(mesh: RouterMesh) -> None:
    """llm-d/llm-d-router 1909 and 2119: the model of the body and a header of the client became
    labels, and each value that was ever sent stayed in memory and in every scrape. A thousand
    different models, headers, paths, methods and parameters add no series here."""
    for number in range(WAYS):
        await strange_request(mesh, number)
    await mesh.wait_idle()
    own = {"rtt": len(mesh.nodes), "placement_nodes": 1}  # every node is measured, demand is seen
    before = await series_of(mesh)
    async with asyncio.timeout(20):
        while any(sum(kind in name for name in before) < count for kind, count in own.items()):
            await asyncio.sleep(0.05)
            before = await series_of(mesh)
    assert any("popmesh_refused_total" in name for name in before)
    for start in range(WAYS, 1000 + WAYS, 50):
        await asyncio.gather(*(strange_request(mesh, n) for n in range(start, start + 50)))
    await mesh.wait_idle()
    after = await series_of(mesh)
    assert after == before
    assert not any("strange" in name.lower() for name in after)
