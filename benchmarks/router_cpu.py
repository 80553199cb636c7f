"""CPU that the router spends per SSE event and per small request, next to a plain HTTP proxy.

    python benchmarks/router_cpu.py --out benchmarks/results/router.json [--rounds 5] \\
        [--seconds 6] [--before CHECKOUT]

The peer is the least that a router over HTTP backends could do in the same language: an aiohttp
proxy on uvloop that passes bytes on. Both serve the same events, made by a process that stands in
for nodes (mesh wire) or for an OpenAI backend (HTTP). Like an engine, it emits one token for every
running stream at each step, so the wire carries one frame per step where HTTP carries one write per
stream.

Loads: ``small``: 16 clients, answers of one token, not streamed. ``stream``: 32 clients, 128 tokens
a stream, a step every 20 ms, on one node. ``stream_split``: the same with prefill and decode on two
nodes (router only). CPU is the growth of ``/proc/PID/task/*/schedstat`` over the measured window,
divided by the events or requests that clients received in it. Rounds alternate between the two,
or three: ``--before`` adds the router of another checkout, to see what a change costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import uvloop
from aiohttp import web
from report import command_line, commit, facts, save

from registry.client import Registry
from registry.entries import Registration
from router.api.render import StreamRenderer, Usage, whole_answer
from wire.framing import FrameWriter, encode, node_side_reader
from wire.messages import (
    MAX_VERSION,
    MIN_VERSION,
    Accepted,
    Cancel,
    EngineLoad,
    Finished,
    Hello,
    Load,
    ModelOffer,
    NodeMessage,
    Ping,
    Pong,
    Step,
    StepEntry,
    Submit,
)

MODEL = "mock"
STEP_S = 0.020
TEXT = " token"
TOKENS = 128
WARM_S = 2.0
START_TIMEOUT_S = 60.0

TOPOLOGY = """
mesh: bench
models:
  mock: {source: "none"}
sites:
  here: {lat: 0, lon: 0, region: none}
nodes:
  n1: {site: here, mesh: "127.0.0.1:1", kv: "127.0.0.1:2"}
  n2: {site: here, mesh: "127.0.0.1:3", kv: "127.0.0.1:4"}
routers:
  r: {site: here}
  before: {site: here}
"""

LOADS: dict[str, dict[str, Any]] = {
    "small": {"clients": 16, "tokens": 1, "stream": False, "nodes": ("n1", "n1")},
    "stream": {"clients": 32, "tokens": TOKENS, "stream": True, "nodes": ("n1", "n1")},
    "stream_split": {"clients": 32, "tokens": TOKENS, "stream": True, "nodes": ("n1", "n2")},
}


# ---- stand-ins -----------------------------------------------------------------------------------


class StandInNode(asyncio.Protocol):
    """A node's side of one link: every running stream gets a token per step, all in one frame."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._reader = node_side_reader()
        self._writer = FrameWriter()
        self._running: dict[int, list[int]] = {}  # stream: next index, limit
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        offer = ModelOffer(MODEL, "00", 8192, 1000, 16, 65536, "float32", "127.0.0.1:1")
        versions = {"min_version": MIN_VERSION, "max_version": MAX_VERSION}
        place = {"mesh": "bench", "kind": "node", "name": self._name, "site": "here"}
        roles = {"roles": ["prefill", "decode"], "models": [offer], "incarnation": "1"}
        self._transport.write(encode(Hello(**versions, **place, **roles)))
        engine = EngineLoad(MODEL, True, 0, 0, 0, 65536, 0, 65536, 1e6, 20.0, 0, 0, 0)
        self._say(Load([engine], [], False))
        self._timer = asyncio.get_running_loop().call_later(STEP_S, self._step)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            match message:
                case Ping(nonce):
                    self._say(Pong(nonce))
                case Cancel(stream):
                    self._running.pop(stream, None)
                case Submit():
                    self._begin(message)

    def _begin(self, submit: Submit) -> None:
        limit = submit.sampling.max_tokens or TOKENS
        self._say(Accepted(submit.stream, 10, 0))
        first = 1 if submit.leg == "decode" else 0
        if first == 0:
            self._say(Step([StepEntry(submit.stream, 0, [1], TEXT.encode())]))
        if submit.leg == "prefill":
            self._say(Finished(submit.stream, "handoff", 1, 0.0, 0.0, None))
        elif limit == 1:
            self._say(Finished(submit.stream, "length", 1, 0.0, 0.0, None))
        else:
            self._running[submit.stream] = [1, limit]

    def _step(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(STEP_S, self._step)
        entries, ended = [], []
        for stream, state in self._running.items():
            entries.append(StepEntry(stream, state[0], [1], TEXT.encode()))
            state[0] += 1
            if state[0] == state[1]:
                ended.append(stream)
        if entries:
            self._say(Step(entries))
        for stream in ended:
            _, limit = self._running.pop(stream)
            self._say(Finished(stream, "length", limit, 0.0, 0.0, None))

    def _say(self, message: NodeMessage) -> None:
        assert self._transport is not None
        self._transport.write(self._writer.push(message))


async def serve_nodes(registry_url: str) -> None:
    """Both nodes, registered."""
    loop = asyncio.get_running_loop()
    async with Registry.connect(registry_url) as registry:
        for name in ("n1", "n2"):
            server = await loop.create_server(lambda name=name: StandInNode(name), "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            meta = {"mesh": "bench", "name": name, "site": "here", "incarnation": "1", "drain": "0"}
            entry = Registration(name, "popmesh-node", "127.0.0.1", port, meta, 3600.0, 3600.0)
            await registry.register(entry, "passing")
        await loop.create_future()


async def serve_backend(port: int) -> None:
    """An OpenAI-like HTTP backend that emits the events which the router would."""
    waiting: list[asyncio.Future[None]] = []
    renderer = StreamRenderer("chat", "chatcmpl-" + "0" * 32, MODEL, 0, False)
    event = renderer.text(TEXT.encode(), 1)

    async def steps() -> None:
        while True:
            await asyncio.sleep(STEP_S)
            for future in waiting:
                future.set_result(None)
            waiting.clear()

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        usage = Usage(10, 0, body["max_tokens"])
        if not body["stream"]:
            whole = whole_answer("chat", "x" * 41, MODEL, 0, TEXT.encode(), "length", usage)
            return web.Response(body=whole, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(renderer.opening() + event)
        for _ in range(body["max_tokens"] - 1):
            future = asyncio.get_running_loop().create_future()
            waiting.append(future)
            await future
            await response.write(event)
        await response.write_eof(renderer.closing("length", usage))
        return response

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(steps())
        await _serve(answer, port)


async def serve_proxy(port: int, target: str) -> None:
    """The peer: passes bytes between client and backend."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def forward(request: web.Request) -> web.StreamResponse:
            data = await request.read()
            url = target + request.path
            async with session.post(
                url, data=data, headers={"Content-Type": "application/json"}
            ) as up:
                kind = {"Content-Type": up.headers["Content-Type"]}
                if up.content_length is not None:
                    return web.Response(body=await up.read(), status=up.status, headers=kind)
                response = web.StreamResponse(status=up.status, headers=kind)
                await response.prepare(request)
                async for chunk in up.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response

        await _serve(forward, port)


async def _serve(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], port: int
) -> None:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.get_running_loop().create_future()


# ---- clients -------------------------------------------------------------------------------------


class Tally:
    """What clients received while ``counting``."""

    def __init__(self) -> None:
        self.counting = False
        self.events = 0
        self.requests = 0


async def client(port: int, load: dict[str, Any], tally: Tally) -> None:
    """Ask again and again on one connection, until cancelled."""
    ask = {"model": MODEL, "max_tokens": load["tokens"], "stream": load["stream"]}
    body = json.dumps(ask | {"messages": [{"role": "user", "content": "hello"}]}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"x-popmesh-route: prefill={load['nodes'][0]},decode={load['nodes'][1]}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await asyncio.sleep(random.random() * STEP_S * 10)
        while True:
            writer.write(head + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), answer
            if load["stream"]:
                tail = b""
                while not tail.endswith(b"\r\n0\r\n\r\n"):
                    data = await reader.read(65536)
                    assert data, "the connection ended in mid-answer"
                    if tally.counting:
                        tally.events += data.count(b"data: ")
                    tail = (tail + data)[-7:]
            else:
                length = answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
                await reader.readexactly(int(length))
            tally.requests += tally.counting
    finally:
        writer.close()


async def measure(port: int, pid: int, load: dict[str, Any], seconds: float) -> dict[str, float]:
    """CPU of ``pid`` per event and per request under ``load``."""
    tally = Tally()
    async with asyncio.TaskGroup() as tasks:
        clients = [tasks.create_task(client(port, load, tally)) for _ in range(load["clients"])]
        await asyncio.sleep(WARM_S)
        tally.counting, before, start = True, cpu_s(pid), time.monotonic()
        await asyncio.sleep(seconds)
        wall, cpu, tally.counting = time.monotonic() - start, cpu_s(pid) - before, False
        for task in clients:
            task.cancel()
    out = {"wall_s": wall, "cpu_s": cpu, "requests": tally.requests, "events": tally.events}
    if load["stream"]:
        return out | {
            "events_per_s": tally.events / wall,
            "cpu_us_per_event": cpu / tally.events * 1e6,
        }
    per_request = cpu / tally.requests * 1e6
    return out | {"requests_per_s": tally.requests / wall, "cpu_us_per_request": per_request}


# ---- processes -----------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process so far."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def started(*command: str, log: Path, cwd: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child process, ended with the block."""
    with log.open("ab") as output:
        child = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, cwd=cwd)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_answer(port: int, route: str) -> None:
    """Until a request through ``port`` is answered."""
    ask = {"model": MODEL, "max_tokens": 1, "stream": False}
    body = json.dumps(ask | {"messages": [{"role": "user", "content": "hello"}]}).encode()
    headers = {"Content-Type": "application/json", "x-popmesh-route": route}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def run(
    rounds: int, seconds: float, work: Path, before: Path | None
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Raw samples by load and side."""
    topology = work / "mesh.yaml"
    topology.write_text(TOPOLOGY)
    directory, router, backend, proxy = (free_port() for _ in range(4))
    registry = f"consul://127.0.0.1:{directory}"
    here, log = str(Path(__file__).resolve()), work / "log"
    mesh = ["-m", "popmesh", "router", "--topology", str(topology), "--registry", registry]
    listen = ["--listen", f"127.0.0.1:{router}"]
    samples: dict[str, dict[str, list[dict[str, float]]]] = {}
    with contextlib.ExitStack() as stack:
        own = stack.enter_context
        own(started("-m", "popmesh", "registry", "--listen", f"127.0.0.1:{directory}", log=log))
        time.sleep(2)
        own(started(here, "--serve", "nodes", registry, log=log))
        own(started(here, "--serve", "backend", str(backend), log=log))
        ours = own(started(*mesh, "--name", "r", *listen, log=log))
        sides = {"popmesh": (router, ours.pid)}
        if before is not None:  # ``-m`` looks into the working directory first
            port = free_port()
            listen = ["--name", "before", "--listen", f"127.0.0.1:{port}"]
            sides["before"] = port, own(started(*mesh, *listen, log=log, cwd=before)).pid
        target = f"http://127.0.0.1:{backend}"
        peer = own(started(here, "--serve", "proxy", str(proxy), target, log=log))
        for port, _ in sides.values():
            wait_answer(port, "prefill=n1,decode=n2")
        wait_answer(proxy, "")
        sides["aiohttp-proxy"] = proxy, peer.pid
        for number in range(rounds):
            for name, load in LOADS.items():
                for side, (port, pid) in sorted(sides.items(), reverse=bool(number % 2)):
                    if name == "stream_split" and side == "aiohttp-proxy":
                        continue
                    found = uvloop.run(measure(port, pid, load, seconds))
                    samples.setdefault(name, {}).setdefault(side, []).append(found)
                    shown = {key: round(value, 1) for key, value in found.items()}
                    print(name, side, shown, flush=True)
    return samples


def summary(samples: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians over rounds, and peer / popmesh where there is a peer."""
    out: dict[str, Any] = {}
    for name, sides in samples.items():
        key = "cpu_us_per_event" if LOADS[name]["stream"] else "cpu_us_per_request"
        medians = {side: statistics.median(s[key] for s in got) for side, got in sides.items()}
        out[name] = {key: {side: round(value, 1) for side, value in medians.items()}}
        for side, word in (("aiohttp-proxy", "peer"), ("before", "before")):
            if side in medians:
                out[name][f"{word}_over_popmesh"] = round(medians[side] / medians["popmesh"], 2)
    return out


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--before", type=Path, help="another checkout, whose router runs too")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    match args.serve:
        case ["nodes", registry]:
            uvloop.run(serve_nodes(registry))
        case ["backend", port]:
            uvloop.run(serve_backend(int(port)))
        case ["proxy", port, target]:
            uvloop.run(serve_proxy(int(port), target))
    if args.out is None:
        parser.error("--out is needed")
    with tempfile.TemporaryDirectory(prefix="popmesh-bench-") as work:
        samples = run(args.rounds, args.seconds, Path(work), args.before)
    report = facts(__doc__, ("aiohttp", "uvloop", "msgspec")) | {
        "before": commit(args.before) if args.before is not None else None,
        "warm_up_s": WARM_S,
        "loads": LOADS,
        "summary": summary(samples),
        "samples": samples,
    }
    save(report, args.out)
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
