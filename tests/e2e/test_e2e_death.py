"""A node dies in mid-stream: the client reads the same text, and the node comes back."""

from __future__ import annotations

import asyncio
import os
import signal

import openai
import pytest

from tests.e2e.mesh import Mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ASK = {
    "model": "smollm2-135m-f32",
    "prompt": "Once upon a time, in a small village by the sea, there lived",
    "max_tokens": 80,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


def pids(mesh: Mesh, name: str) -> tuple[int, int]:
    """(agent, engine) process ids of a node."""
    node = next(n for n in mesh.ready["nodes"] if n["name"] == name)
    return node["agent_pid"], node["engines"][0]["pid"]


async def wait_reborn(mesh: Mesh, name: str, old_engine: int) -> None:
    """Until the node has a new engine and every node serves."""
    for _ in range(600):
        if mesh.ready_file.exists() and pids(mesh, name)[1] != old_engine:
            nodes = mesh.status()["nodes"]
            if len(nodes) == 2 and all(e["ready"] for n in nodes for e in n["engines"]):
                return
        await asyncio.sleep(0.1)
    raise AssertionError(f"not ready again: {mesh.status()}")


@pytest.mark.parametrize("victim", ["agent", "engine"])
async def test_the_stream_goes_on_elsewhere(exact_mesh, victim):
    async with openai.AsyncOpenAI(
        base_url=f"{exact_mesh.url}/v1", api_key="none", max_retries=0
    ) as client:
        undisturbed = (await client.completions.create(**ASK)).choices[0].text
        raw = await client.completions.with_raw_response.create(**ASK, stream=True)
        name, request_id = raw.headers["x-popmesh-decode"], raw.headers["x-popmesh-request-id"]
        agent, engine = pids(exact_mesh, name)
        text, events = "", 0
        async for event in raw.parse():
            text += event.choices[0].text
            events += 1
            if events == 10:
                os.kill(agent if victim == "agent" else engine, signal.SIGKILL)
    assert text == undisturbed
    record = exact_mesh.request_record(request_id)
    assert record["outcome"] == "length"
    assert len(record["attempts"]) == 2
    assert 0 < record["attempts"][1]["forced_tokens"] < 80
    await wait_reborn(exact_mesh, name, engine)
