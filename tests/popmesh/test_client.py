"""The command line's HTTP client against a small server, and what it shows of the answers."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from rich.console import Console

from popmesh.client import (
    Answer,
    Attempt,
    ClientPlace,
    MeshClient,
    Plan,
    Reason,
    Record,
    Rejected,
    Route,
    Transfer,
)
from popmesh.conversation import converse
from popmesh.render.progress import Phases
from popmesh.render.routes import plan_view, record_view, summary_line
from popmesh.render.status import status_view
from popmesh.showcase import sample_problem
from wire.errors import ConfigError, OverloadError, PeerError, RequestError

ROUTE = Route(
    "fra-1", "lhr-1", "fra", "lhr", 0.123, [Reason("to_prefill", 0.012, "RTT 12.0 ms measured")]
)
LOCAL = Route("iad-1", "iad-1", "iad", "iad", 0.3, [Reason("queue", 0.1, "busy")])
MOVED = Transfer(9_216_000, 9_300_000, 8_294_400, 410.0, 430.0, 21.0, 15.0)
ATTEMPTS = [Attempt(1, ROUTE, "stop")]
RECORD = Record("req-1", "small", "stop", ATTEMPTS, 420.0, 900.0, 1.0, 400.0, MOVED)


BUSY = {"error": {"message": "busy", "code": "overloaded"}}


@contextlib.asynccontextmanager
async def serving(handler) -> AsyncIterator[MeshClient]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with MeshClient(f"http://127.0.0.1:{port}/", "sk-1") as client:
            yield client
    finally:
        await runner.cleanup()


def events(*chunks: bytes):
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "x-popmesh-request-id": "req-1",
                "x-popmesh-prefill": "fra-1",
                "x-popmesh-decode": "lhr-1",
            }
        )
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        return response

    return handler


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


async def collect(client: MeshClient) -> tuple[list[str], Answer]:
    answer = Answer()
    return [text async for text in client.chat(answer, "small", [])], answer


async def test_an_answer_is_streamed_whatever_the_cuts():
    whole = delta("Grüße, ") + b": still here\n\n" + delta("Welt", "stop")
    whole += event({"choices": [], "usage": {"completion_tokens": 2}}) + b"data: [DONE]\n\n"
    for at in (1, 9, 30, len(whole) - 3):
        async with serving(events(whole[:at], whole[at:])) as client:
            texts, answer = await collect(client)
        assert texts == ["Grüße, ", "Welt"]
        assert (answer.finish_reason, answer.usage) == ("stop", {"completion_tokens": 2})
        assert (answer.request_id, answer.prefill, answer.decode) == ("req-1", "fra-1", "lhr-1")


async def test_an_error_inside_the_stream_is_raised_after_the_text():
    failure = event({"error": {"message": "site lost", "code": "no_route"}})
    async with serving(events(delta("Hel"), failure)) as client:
        answer = Answer()
        with pytest.raises(OverloadError, match="site lost"):
            async for _ in client.chat(answer, "small", []):
                pass
    assert answer.text == "Hel"
    assert answer.finish_reason is None


@pytest.mark.parametrize(
    ("status", "body", "expected", "said"),
    [
        (404, {"error": {"message": "none", "code": "model_not_found"}}, RequestError, "none"),
        (429, BUSY, OverloadError, "busy"),
        (400, {"error": {"message": "odd", "code": None}}, RequestError, "odd"),
        (401, {}, RequestError, "POPMESH_API_KEY"),
        (502, "<html>", PeerError, "HTTP 502"),
    ],
)  # fmt: skip
async def test_a_refusal_keeps_its_meaning(status, body, expected, said):
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    async with serving(refuse) as client:
        with pytest.raises(expected, match=said):
            await client.status()


async def test_an_answer_of_another_program_is_refused():
    async def other(_: web.Request) -> web.Response:
        return web.Response(text="It works!")

    async with serving(other) as client:
        with pytest.raises(PeerError, match="something else"):
            await client.record("x")


async def test_nobody_there_says_what_to_start():
    async with MeshClient("http://127.0.0.1:1") as client:
        with pytest.raises(ConfigError, match="popmesh up"):
            await client.models()
    async with MeshClient("no url") as client:
        with pytest.raises(ConfigError, match="http://HOST:PORT"):
            await client.models()


async def test_a_pinned_probe_says_what_it_needs_and_counts_the_tokens():
    seen = {}

    async def complete(request: web.Request) -> web.Response:
        seen.update(await request.json(), route=request.headers["x-popmesh-route"])
        seen["key"] = request.headers["authorization"]
        return web.json_response({"usage": {"completion_tokens": seen.get("answer", 2)}})

    async with serving(complete) as client:
        await client.complete_pinned("small", "fra-1", "lhr-1")
        assert seen["route"] == "prefill=fra-1,decode=lhr-1"
        assert seen["key"] == "Bearer sk-1"
        assert (seen["max_tokens"], seen["ignore_eos"]) == (2, True)
        seen["answer"] = 1
        with pytest.raises(PeerError, match="two tokens"):
            await client.complete_pinned("small", "fra-1", "lhr-1")


async def test_a_failed_turn_is_forgotten_and_the_chat_goes_on():
    asked = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return web.json_response(json.loads(to_json(RECORD)))
        messages = (await request.json())["messages"]
        asked.append([message["content"] for message in messages])
        if len(asked) == 1:
            return web.json_response(BUSY, status=429)
        return await events(delta("fine", "stop"), b"data: [DONE]\n\n")(request)

    async def lines() -> AsyncIterator[str]:
        for line in ("first", " ", "second", "third"):
            yield line

    console = Console(width=200, record=True, quiet=False, file=None)
    async with serving(handler) as client:
        assert not await converse(client, console, "small", lines())
    assert asked == [["first"], ["second"], ["second", "fine", "third"]]
    shown = console.export_text()
    assert "busy" in shown
    assert "fra-1 (fra) -> lhr-1 (lhr)" in shown


def to_json(value: object) -> bytes:
    import msgspec

    return msgspec.json.encode(value)


def text_of(view: object) -> str:
    console = Console(width=240, record=True, file=None, quiet=False)
    console.print(view)
    return console.export_text()


def test_a_record_shows_route_bytes_and_the_hidden_share():
    shown = text_of(record_view(RECORD))
    for expected in (
        "fra-1 (fra) -> lhr-1 (lhr)",
        "9.2 MB",
        "90 %",
        "RTT 15.0 ms",
        "12.0",
        "21 ms",
    ):
        assert expected in shown
    assert "90 % hidden" in summary_line(RECORD)


def test_a_plan_shows_every_candidate_and_who_is_out():
    plan = Plan(
        ClientPlace(48.1, 11.6, "header"), 700, ROUTE, [LOCAL], [Rejected("iad-2", "draining")]
    )
    shown = text_of(plan_view(plan))
    for expected in ("fra-1 -> lhr-1", "iad-1 -> iad-1", "123.0", "300.0", "draining"):
        assert expected in shown


def test_a_status_shows_nodes_with_and_without_engines():
    engine = {
        "model": "small", "ready": True, "running": 1, "waiting": 0, "free_blocks": 10,
        "cached_blocks": 5, "total_blocks": 20, "prefill_tokens_per_s": 0.0, "decode_step_ms": 31.0,
    }  # fmt: skip
    node = {
        "name": "fra-1", "site": "fra", "roles": ["prefill"], "link": "up", "link_error": None,
        "rtt_ms": 15.0, "rtt_measured": True, "draining": False, "engines": [engine],
    }  # fmt: skip
    down = node | {"name": "lhr-1", "link": "down", "link_error": "refused", "engines": []}
    status = {
        "router": "r", "site": "fra", "mesh": "demo", "running": 2, "registry_age_s": None,
        "routable": [], "nodes": [node, down],
    }  # fmt: skip
    shown = text_of(status_view(status))
    for expected in ("15/20", "31", "refused", "none", "not heard yet"):
        assert expected in shown


def finished(**changed: object) -> Answer:
    return Answer(**({"text": "It rained.", "finish_reason": "stop"} | changed))


@pytest.mark.parametrize(
    ("answer", "record", "problem"),
    [
        (finished(), RECORD, None),
        (finished(finish_reason="length"), RECORD, None),
        (finished(finish_reason=None), RECORD, "ended with None"),
        (finished(text=" "), RECORD, "ended with stop"),
        (finished(), Record("r", "m", "stop", [Attempt(1, LOCAL, "stop")]), "both at iad"),
        (finished(), Record("r", "m", "stop", [Attempt(1, ROUTE, "stop")]), "no KV"),
    ],
)
def test_the_demo_only_passes_when_a_whole_answer_crossed_sites(answer, record, problem):
    said = sample_problem(answer, record)
    assert said is None if problem is None else problem in said


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_names_every_phase_and_completes_it(terminal):
    console = Console(file=io.StringIO(), record=True, width=120, force_terminal=terminal)
    with Phases(console) as phases:
        phases.report("download", 0, 0)
        phases.report("download", 1_000_000, 2_000_000)
        phases.report("convert", 5_000_000, 5_000_000)
        for number in range(3):
            phases.report("nodes", number, 2)
    shown = console.export_text()
    for words in ("Downloading", "Converting", "Loading the model at every node"):
        assert words in shown
    if terminal:
        assert "2/2" in shown
        assert "2/2 MB" in shown, "a phase that is over was left incomplete"


@pytest.mark.parametrize("url", ["foo", "ftp://router", "127.0.0.1:8080", "http://"])
async def test_what_is_no_url_is_said_to_be_none(url):
    async with MeshClient(url) as client:
        with pytest.raises(ConfigError, match="write http://HOST:PORT"):
            await client.status()


async def test_the_base_url_of_openai_clients_is_understood():
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"path": request.path})

    async with serving(handler) as client, MeshClient(f"{client.url}/v1/") as other:
        assert (await other.status())["path"] == "/popmesh/status"


def test_status_fits_a_terminal_of_80_columns():
    load = {"model": "smollm2-135m", "ready": True, "running": 12, "waiting": 3}
    load |= {"free_blocks": 1024, "cached_blocks": 0, "total_blocks": 1024}
    load |= {"prefill_tokens_per_s": 1001.0, "decode_step_ms": 21.0}
    node = {"name": "fra-1", "site": "fra", "roles": ["prefill"], "link": "up", "draining": False}
    node |= {"rtt_ms": 0.4, "rtt_measured": True, "link_error": None, "engines": [load]}
    status = {"router": "r", "site": "fra", "mesh": "m", "running": 0, "registry_age_s": 1.0}
    screen = io.StringIO()
    shown = status | {"routable": ["smollm2-135m"], "nodes": [node]}
    Console(file=screen, width=80).print(status_view(shown))
    assert "smollm2-135m" in screen.getvalue().split("Models with a route")[0]
    assert "1024/1024" in screen.getvalue()
