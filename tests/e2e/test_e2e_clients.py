"""Real OpenAI clients, real disconnects, real bad input, against the demo mesh."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.mesh import Mesh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


def sync_client(mesh: Mesh) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0)


def async_client(mesh: Mesh) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0)


def test_models(demo_mesh):
    with sync_client(demo_mesh) as client:
        assert [model.id for model in client.models.list()] == [MODEL]


def test_chat(demo_mesh):
    with sync_client(demo_mesh) as client:
        done = client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=16, temperature=0
        )
    assert "Paris" in (done.choices[0].message.content or "")
    assert done.choices[0].finish_reason == "stop"
    assert done.usage is not None
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


async def test_async_streams_at_once(demo_mesh):
    """Bfloat16 answers may differ with the batch they ran in; lengths and endings may not."""
    async with async_client(demo_mesh) as client:

        async def one(number: int) -> None:
            stream = await client.completions.create(
                model=MODEL,
                prompt=f"Chapter {number}. It was a dark night and",
                max_tokens=12,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            events = [event async for event in stream]
            assert "".join(e.choices[0].text for e in events if e.choices)
            assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
            assert events[-1].usage is not None
            assert events[-1].usage.completion_tokens == 12

        await asyncio.gather(*(one(n) for n in range(12)))


def test_stop_strings(demo_mesh):
    ask: dict[str, Any] = {
        "model": MODEL,
        "prompt": "1, 2, 3, 4, 5, 6,",
        "max_tokens": 30,
        "temperature": 0,
    }
    with sync_client(demo_mesh) as client:
        whole = client.completions.create(**ask).choices[0].text
        assert "9, 10" in whole
        cut = client.completions.create(**ask, stop=["9, 10"]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index("9, 10")]


def test_headers_name_the_sites_and_pins_hold(demo_mesh):
    nodes = {node["name"]: node for node in demo_mesh.ready["nodes"]}
    prefill = next(n for n, node in nodes.items() if node["roles"] == ["prefill"])
    decode = next(n for n, node in nodes.items() if node["roles"] == ["decode"])
    with sync_client(demo_mesh) as client:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=QUESTION,
            max_tokens=8,
            extra_headers={"x-popmesh-route": f"prefill={prefill},decode={decode}"},
        )
    assert raw.headers["x-popmesh-prefill"] == prefill
    assert raw.headers["x-popmesh-decode"] == decode
    record = demo_mesh.request_record(raw.headers["x-popmesh-request-id"])
    assert record["transfer"]["kv_bytes"] > 0


def test_a_pin_that_the_topology_forbids_is_refused(demo_mesh):
    nodes = {node["name"]: node for node in demo_mesh.ready["nodes"]}
    decode_only = next(n for n, node in nodes.items() if node["roles"] == ["decode"])
    with sync_client(demo_mesh) as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            extra_headers={"x-popmesh-route": f"prefill={decode_only},decode={decode_only}"},
        )
    assert decode_only in str(caught.value)


BAD_BODIES: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nope", "messages": QUESTION}, 404, "nope"),
    ({"model": MODEL, "messages": []}, 400, "messages"),
    ({"model": MODEL}, 400, "messages"),
    ({"model": MODEL, "messages": QUESTION, "max_tokens": -1}, 400, "max_tokens"),
    ({"model": MODEL, "messages": QUESTION, "max_tokens": 1.5}, 400, "max_tokens"),
    ({"model": MODEL, "messages": QUESTION, "temperature": 1e30}, 400, "temperature"),
    ({"model": MODEL, "messages": QUESTION, "seed": 10**30}, 400, "seed"),
    ({"model": MODEL, "messages": QUESTION, "tools": [{}]}, 400, "tools"),
    ({"model": MODEL, "messages": QUESTION, "n": 2}, 400, "n"),
    ({"model": MODEL, "messages": QUESTION, "frobnicate": 1}, 400, "frobnicate"),
    ({"model": MODEL, "messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context"),
]


@pytest.mark.parametrize(("body", "status", "word"), BAD_BODIES)
def test_bad_bodies(demo_mesh, body, status, word):
    answer = httpx.post(f"{demo_mesh.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "code", "param"}
    assert word in error["message"]


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b'"x"', b"\xff\xfe", b'{"model": NaN}'])
def test_invalid_json(demo_mesh, body):
    answer = httpx.post(f"{demo_mesh.url}/v1/chat/completions", content=body, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_a_body_over_the_limit(demo_mesh):
    body = json.dumps({"model": MODEL, "prompt": "x" * (11 * 1024 * 1024)}).encode()
    answer = httpx.post(f"{demo_mesh.url}/v1/completions", content=body, timeout=30)
    assert answer.status_code == 413


def test_half_a_request_and_silence_disturbs_nobody(demo_mesh):
    host, port = demo_mesh.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        with sync_client(demo_mesh) as client:
            client.completions.create(model=MODEL, prompt="Hello", max_tokens=2)
        assert b" 408 " in half.recv(4096)


def resources(mesh: Mesh) -> dict[int, tuple[int, int]]:
    """Open file descriptors and resident bytes of every process of the mesh."""
    out = {}
    for process in psutil.Process(mesh.process.pid).children(recursive=True):
        out[process.pid] = (process.num_fds(), process.memory_info().rss)
    return out


def at_rest(mesh: Mesh) -> list[str]:
    """What is not at rest, in words; empty when everything is."""
    busy = []
    status = mesh.status()
    if status["in_flight"]:
        busy.append(f"router: {status['in_flight']} requests")
    for node in status["nodes"]:
        for engine in node["engines"]:
            counts = {
                name: engine[name]
                for name in ("running", "waiting", "transfers_in", "transfers_out", "streams")
            }
            if any(counts.values()):
                busy.append(f"{node['name']}: {counts}")
            if engine["free_blocks"] + engine["cached_blocks"] != engine["total_blocks"]:
                busy.append(f"{node['name']}: blocks held")
    return busy


async def wait_at_rest(mesh: Mesh) -> None:
    for _ in range(300):
        busy = at_rest(mesh)
        if not busy:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"not at rest: {busy}")


async def test_nothing_leaks(demo_mesh):
    """200 mixed requests, a third of the clients leaving at random moments."""
    rng = random.Random(3)
    text = "The quick brown fox jumps over the lazy dog. " * 40
    gate = asyncio.Semaphore(16)
    finished = left = 0

    async with async_client(demo_mesh) as client:

        async def one(number: int) -> None:
            nonlocal finished, left
            size = rng.choice([20, 100, 400, 1200])
            leave_after = rng.choice([0, 1, 3, 8]) if number % 3 == 0 else None
            at_once = rng.random() * 0.3 if number % 6 == 0 else None
            async with gate:
                create = client.completions.create(
                    model=MODEL,
                    prompt=f"{number}: {text[:size]}",
                    max_tokens=rng.choice([1, 2, 5, 16]),
                    temperature=rng.choice([0.0, 1.0]),
                    stream=True,
                )
                if at_once is not None:
                    task = asyncio.ensure_future(create)
                    await asyncio.wait([task], timeout=at_once)
                    if not task.done():
                        task.cancel()
                        left += 1
                        return
                    stream = task.result()
                else:
                    stream = await create
                count = 0
                async with stream:
                    async for _ in stream:
                        count += 1
                        if leave_after is not None and count > leave_after:
                            left += 1
                            return
                finished += 1

        # KV connections between two nodes are made once and kept: make them all first.
        nodes = demo_mesh.ready["nodes"]
        for prefill in (n["name"] for n in nodes if "prefill" in n["roles"]):
            for decode in (n["name"] for n in nodes if "decode" in n["roles"]):
                await client.completions.create(
                    model=MODEL,
                    prompt="Hello",
                    max_tokens=2,
                    extra_headers={"x-popmesh-route": f"prefill={prefill},decode={decode}"},
                )
        await asyncio.gather(*(one(n) for n in range(16)))
        await wait_at_rest(demo_mesh)
        before = resources(demo_mesh)
        await asyncio.gather(*(one(n) for n in range(200)))
    assert left >= 40
    assert finished >= 120
    await wait_at_rest(demo_mesh)
    after = resources(demo_mesh)
    assert after.keys() == before.keys(), "no process died"
    for pid, (fds, rss) in after.items():
        assert fds <= before[pid][0] + 4, f"descriptors of {psutil.Process(pid).cmdline()}"
        assert rss <= before[pid][1] + 64 * 1024 * 1024, (
            f"memory of {psutil.Process(pid).cmdline()}"
        )
