"""A router that says "ready" before anything can be answered."""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes.fake_node import idle_engine
from tests.router.router_mesh import MODEL, RouterMesh, entry_of


async def readiness(mesh: RouterMesh, wanted: int) -> None:
    """Wait until /ready has this status; what it says of models must agree with it."""
    async with asyncio.timeout(20):
        while True:
            async with mesh.http.get("/ready") as response:
                assert (await response.json())["models"] == [MODEL] * (response.status == 200)
                if response.status == wanted:
                    return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("missing", ["fra-1", "lhr-1"])
async def test_sglang_33740_half_a_pair_is_not_ready(one_pair: RouterMesh, missing: str) -> None:
    """sgl-project/sglang 33740: a disaggregated router counted as ready as soon as any worker had
    registered, though there was no prefill node yet, or no decode node, and turned the first
    requests away. Ready means that one whole pair is there."""
    node = one_pair.nodes[missing]
    await readiness(one_pair, 200)
    await node.stop()
    await readiness(one_pair, 503)
    assert (await one_pair.http.get("/health")).status == 200  # alive is another question
    await node.start()
    one_pair.directory.list(entry_of(each) for each in one_pair.nodes.values())
    await readiness(one_pair, 200)
    assert (await one_pair.chat()).status == 200


async def test_sglang_33740_engines_that_still_load_are_not_ready(one_pair: RouterMesh) -> None:
    """sgl-project/sglang 33740: a node that is connected, and whose engine has not produced a token
    yet, does not count either."""
    lhr = one_pair.nodes["lhr-1"]
    for ready, status in ((False, 503), (True, 200)):
        lhr.load = idle_engine(MODEL, ready=ready)
        lhr.tell(lhr.load_message())
        await readiness(one_pair, status)
