"""What stands around the router in ``router_cpu.py``: nodes, an OpenAI backend, and the peer.

    python benchmarks/parts/router_stand_ins.py nodes REGISTRY | backend PORT | proxy PORT TARGET

Each is a process of its own. Like an engine, nodes and backend emit one token for every running
stream at each step, so the mesh wire carries one frame per step where HTTP carries one write per
stream.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import cast

import aiohttp
import uvloop
from aiohttp import web

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
    event = renderer.text(TEXT.encode(), b"1")

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
        await response.write_eof(renderer.closing("length", usage, None))
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


def main(arguments: list[str]) -> None:
    """Command line."""
    match arguments:
        case ["nodes", registry]:
            uvloop.run(serve_nodes(registry))
        case ["backend", port]:
            uvloop.run(serve_backend(int(port)))
        case ["proxy", port, target]:
            uvloop.run(serve_proxy(int(port), target))
        case _:
            raise SystemExit((__doc__ or "").splitlines()[2].strip())


if __name__ == "__main__":
    main(sys.argv[1:])
