"""A drill's client: what it takes for an answer, when it asks again, when it gives up."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from dataclasses import replace

from aiohttp import web

from popmesh.drill import stream
from popmesh.drill.observation import Observation
from popmesh.drill.stream import Caller, session
from popmesh.drill.workload import Ask, make_asks
from tests.popmesh.fake_doors import MODEL, FakeMesh, doors, words

ASK = replace(make_asks(2, random.Random(1))[1], max_tokens=6, ignore_eos=True)


async def ask(urls: list[str], stages: list[str] | None = None, deadline_s: float = 20.0):
    loop = asyncio.get_running_loop()
    began = loop.time()

    def watch(seen: Observation, stage: str) -> None:
        if stages is not None:
            stages.append(stage)

    async with session(None, 4) as http:
        caller = Caller(http, urls, MODEL, deadline_s, lambda: loop.time() - began, watch)
        return await caller.ask(ASK, 0)


def text_of(asked: Ask) -> str:
    return "".join(words(asked.body(MODEL)))


async def test_an_answer_is_read_to_its_end():
    stages: list[str] = []
    async with doors(FakeMesh()) as urls:
        seen = await ask(urls, stages)
    assert seen.complete
    assert seen.text == text_of(ASK)
    assert (seen.completion_tokens, seen.finish_reason) == (6, "length")
    assert seen.ids == [f"req1:{n}" for n in range(1, 7)]
    assert seen.nodes == ("p1", "d1")
    assert stages[:2] == ["before-first-token", "kv-in-flight"]
    assert set(stages[2:]) == {"mid-stream"}
    assert len(seen.gaps()) == len(seen.arrivals)


async def test_a_broken_connection_is_resumed_at_the_other_router():
    mesh = FakeMesh(break_after=3)
    async with doors(mesh, 2) as urls:
        seen = await ask(urls)
    assert mesh.resumed == [(urls[1].rpartition(":")[2], "req1:3")]
    assert mesh.requests == 1
    assert seen.text == text_of(ASK)
    assert [loss.url for loss in seen.losses] == [urls[0]]
    assert seen.url == urls[1]
    assert seen.complete


async def test_a_router_that_is_not_there_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with doors(FakeMesh()) as urls:
            seen = await ask([dead, *urls])
    assert seen.text == text_of(ASK)
    assert [loss.url for loss in seen.losses] == [dead]


async def test_an_answer_that_nobody_remembers_is_given_up(monkeypatch):
    monkeypatch.setattr(stream, "RESUME_S", 0.3)
    mesh = FakeMesh(break_after=2)
    mesh.known = _Forgetful()
    async with doors(mesh) as urls:
        seen = await ask(urls)
    assert seen.error == ("stream_unknown", "unknown")
    assert not seen.complete
    assert len(mesh.resumed) >= 2


class _Forgetful(dict):
    def __setitem__(self, key, value) -> None:
        pass


async def test_a_refusal_is_final():
    async def busy(request: web.Request) -> web.Response:
        error = {"message": "busy", "code": "too_many_requests"}
        return web.json_response({"error": error}, status=429)

    async with serving(busy) as url:
        seen = await ask([url])
    assert (seen.error, seen.status) == (("too_many_requests", "busy"), 429)
    assert seen.losses == []


async def test_a_router_that_has_no_route_yet_is_passed_over():
    async def starting(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "none", "code": "no_route"}}, status=503)

    async with serving(starting) as url, doors(FakeMesh()) as urls:
        seen = await ask([url, *urls])
    assert seen.text == text_of(ASK)
    assert [(loss.url, loss.refused) for loss in seen.losses] == [(url, True)]
    assert (seen.error, seen.status) == (None, None)


async def test_an_error_event_is_final():
    async def broken(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"delta":{"content":"Hel"}}]}\n\n')
        await response.write(b'data: {"error":{"message":"site lost","code":"no_route"}}\n\n')
        return response

    async with serving(broken) as url:
        seen = await ask([url])
    assert seen.text == "Hel"
    assert seen.error == ("no_route", "site lost")
    assert seen.losses == []


async def test_nonsense_is_an_error():
    async def nonsense(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: {\n\n")
        return response

    async with serving(nonsense) as url:
        seen = await ask([url])
    assert seen.error is not None
    assert seen.error[0] == "protocol_error"


async def test_silence_ends_at_the_deadline():
    async def silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"delta":{"content":"Hel"}}]}\n\n')
        await asyncio.get_running_loop().create_future()
        return response

    async with serving(silent) as url:
        seen = await ask([url], deadline_s=0.3)
    assert seen.timed_out
    assert seen.text == "Hel"


@contextlib.asynccontextmanager
async def serving(handler):
    app = web.Application()
    app.router.add_post("/{path:.*}", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
