"""A node dies in mid-stream: the client reads the same text, and the node comes back."""

from __future__ import annotations

import os
import signal

import openai
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ASK = {
    "model": "smollm2-135m-f32",
    "prompt": "Once upon a time, in a small village by the sea, there lived",
    "max_tokens": 80,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


@pytest.mark.parametrize("victim", ["agent", "engine"])
async def test_the_stream_goes_on_elsewhere(exact_mesh, victim):
    async with openai.AsyncOpenAI(
        base_url=f"{exact_mesh.url}/v1", api_key="none", max_retries=0
    ) as client:
        undisturbed = (await client.completions.create(**ASK)).choices[0].text
        raw = await client.completions.with_raw_response.create(**ASK, stream=True)
        name, request_id = raw.headers["x-popmesh-decode"], raw.headers["x-popmesh-request-id"]
        agent, engine = exact_mesh.pids(name)
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
    await exact_mesh.wait_reborn(name, engine)
