"""HTTP end to end: a real router process's insides over fake nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import openai
import pytest

from router.request.admission import Limits
from router.request.patience import MAX_ATTEMPTS_STREAMING
from tests.fakes.fake_answer import answer_text
from tests.fakes.fake_connection import Faults
from tests.fakes.fake_node import cache_delta
from tests.router.router_mesh import MODEL, RouterMesh, make_topology, running_mesh
from wire.messages import ChatInput, ChatTurn, Failed, Loading, TextInput, TokensInput

HELLO = ChatInput([ChatTurn("user", "hello")])


@pytest.fixture
async def mesh(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RouterMesh]:
    async with running_mesh(monkeypatch) as running:
        yield running


async def events(response: object) -> list[object]:
    """SSE events of a response: parsed JSON, or the text ``[DONE]``."""
    out: list[object] = []
    async for line in response.content:  # type: ignore[attr-defined]
        text = line.decode().strip()
        if text.startswith("data: "):
            data = text.removeprefix("data: ")
            out.append(data if data == "[DONE]" else json.loads(data))
    return out


def text_of(chunks: list[object]) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for chunk in chunks
        if isinstance(chunk, dict)
        for choice in chunk["choices"]
    )


async def test_whole_answer_crosses_sites(mesh: RouterMesh) -> None:
    response = await mesh.chat(max_tokens=6)
    body = await response.json()
    assert response.status == 200, body
    assert body["choices"][0]["message"]["content"] == answer_text(HELLO, 6)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert response.headers["x-popmesh-prefill"] == "fra-1"
    assert response.headers["x-popmesh-decode"] == "lhr-1"
    assert response.headers["x-popmesh-request-id"] == body["id"]
    await mesh.wait_idle()
    record = await mesh.get_json(f"/popmesh/requests/{body['id']}")
    assert record["outcome"] == "length"
    assert record["transfer"]["hidden_bytes"] == 900
    assert record["ttft_ms"] >= 0


async def test_stream_has_role_text_finish_usage_done(mesh: RouterMesh) -> None:
    response = await mesh.chat(stream=True, stream_options={"include_usage": True})
    assert response.status == 200
    assert response.content_type == "text/event-stream"
    chunks = await events(response)
    assert chunks[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == answer_text(HELLO, 8)
    assert chunks[-3]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-3]["usage"] is None
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["completion_tokens"] == 8
    await mesh.wait_idle()


@pytest.mark.parametrize("prompt", ["once upon", [5, 6, 7]])
async def test_completions_take_text_and_ids(mesh: RouterMesh, prompt: object) -> None:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 5}
    answer = await (await mesh.http.post("/v1/completions", json=body)).json()
    wanted = TextInput(prompt) if isinstance(prompt, str) else TokensInput(prompt)  # type: ignore[arg-type]
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == answer_text(wanted, 5)


async def test_one_token_ends_at_the_prefill_node(mesh: RouterMesh) -> None:
    body = await (await mesh.chat(max_tokens=1)).json()
    assert body["choices"][0]["message"]["content"] == answer_text(HELLO, 1)
    assert body["usage"]["completion_tokens"] == 1
    await mesh.wait_idle()


async def test_openai_client_sync(mesh: RouterMesh) -> None:
    def talk() -> str:
        with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == [MODEL]
            answer = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "hello"}], temperature=0
            )
            return answer.choices[0].message.content or ""

    assert await asyncio.to_thread(talk) == answer_text(HELLO, 8)


async def test_openai_client_async_streaming(mesh: RouterMesh) -> None:
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
    assert text == answer_text(HELLO, 8)
    assert usage is not None
    assert usage.completion_tokens == 8


async def test_disconnect_cancels_both_legs(mesh: RouterMesh) -> None:
    lhr, fra = mesh.nodes["lhr-1"], mesh.nodes["fra-1"]
    lhr.go.clear()
    response = await mesh.chat(stream=True)
    assert response.status == 200  # the first token came from fra
    response.close()
    await lhr.wait_until(lambda: bool(lhr.cancels) and lhr.active == 0)
    assert lhr.cancels == [lhr.submits[0].stream]
    await mesh.wait_idle()
    assert fra.active == 0


async def test_disconnect_before_the_first_token(mesh: RouterMesh) -> None:
    fra, lhr = mesh.nodes["fra-1"], mesh.nodes["lhr-1"]
    fra.go.clear()
    asking = asyncio.ensure_future(mesh.chat(stream=True))
    await fra.wait_until(lambda: fra.active == 1)
    asking.cancel()
    await fra.wait_until(lambda: bool(fra.cancels) and fra.active == 0)
    await lhr.wait_until(lambda: bool(lhr.cancels) and lhr.active == 0)
    await mesh.wait_idle()


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_refusal_is_retried_elsewhere(mesh: RouterMesh, leg: str) -> None:
    node = mesh.nodes["fra-1" if leg == "prefill" else "lhr-1"]
    node.faults = Faults(refuse=("overloaded", True))
    response = await mesh.chat()
    body = await response.json()
    assert body["choices"][0]["message"]["content"] == answer_text(HELLO, 8)
    record = await mesh.get_json(f"/popmesh/requests/{body['id']}")
    assert [a["outcome"] for a in record["attempts"]] == ["overloaded", "stop"]
    await mesh.wait_idle()


@pytest.mark.parametrize("sent", [0, 1, 3])
@pytest.mark.parametrize("how", ["fail_after", "drop_after"])
@pytest.mark.parametrize("name", ["fra-1", "lhr-1"])
async def test_a_dying_leg_is_replaced_in_mid_stream(
    mesh: RouterMesh, name: str, how: str, sent: int
) -> None:
    mesh.nodes[name].faults = Faults(**{how: sent}, times=1)
    chunks = await events(await mesh.chat(stream=True))
    assert text_of(chunks) == answer_text(HELLO, 8)
    assert chunks[-1] == "[DONE]"


async def test_error_in_stream_when_every_attempt_is_in_vain(mesh: RouterMesh) -> None:
    fra, lhr = mesh.nodes["fra-1"], mesh.nodes["lhr-1"]
    lhr.go.clear()
    response = await mesh.chat(stream=True)
    await lhr.wait_until(lambda: lhr.active == 1)
    await fra.wait_until(lambda: fra.active == 0)
    for node in mesh.nodes.values():
        node.faults = Faults(refuse=("engine_died", True))
    lhr.tell(Failed(lhr.submits[0].stream, "engine_died", "told to fail", True))
    chunks = await events(response)
    assert chunks[-1]["error"]["code"] == "engine_died"
    assert text_of(chunks[:-1]) == answer_text(HELLO, 1)
    record = await mesh.get_json(f"/popmesh/requests/{response.headers['x-popmesh-request-id']}")
    assert len(record["attempts"]) == 1 + MAX_ATTEMPTS_STREAMING
    lhr.go.set()
    await mesh.wait_idle()


async def test_client_errors_of_nodes_are_not_retried(mesh: RouterMesh) -> None:
    response = await mesh.chat(messages=[{"role": "user", "content": "x" * 40_000}])
    body = await response.json()
    assert response.status == 400
    assert body["error"]["code"] == "context_length_exceeded"
    assert sum(len(node.submits) for node in mesh.nodes.values()) == 2  # one attempt, two legs
    await mesh.wait_idle()


async def test_no_nodes_is_503_with_retry_after(mesh: RouterMesh) -> None:
    for node in mesh.nodes.values():
        await node.stop()
    await mesh.wait_ready(nodes=0)
    response = await mesh.chat()
    assert response.status == 503
    assert int(response.headers["Retry-After"]) >= 1
    assert (await response.json())["error"]["code"] == "no_route"
    assert (await mesh.http.get("/ready")).status == 503
    assert (await mesh.http.get("/health")).status == 200


async def test_pinned_route(mesh: RouterMesh) -> None:
    pin = {"x-popmesh-route": "prefill=iad-1,decode=lhr-1"}
    response = await mesh.chat(headers=pin)
    assert response.status == 200
    assert response.headers["x-popmesh-prefill"] == "iad-1"
    assert response.headers["x-popmesh-decode"] == "lhr-1"
    for wrong in ("prefill=lhr-1", "decode=nowhere", "decode", "fra-1", "prefill=,"):
        refused = await mesh.chat(headers={"x-popmesh-route": wrong})
        assert refused.status == 400, wrong
        assert (await refused.json())["error"]["param"] == "x-popmesh-route"


async def test_explain_follows_the_client_and_runs_nothing(mesh: RouterMesh) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    near_iad = {"x-popmesh-client-geo": "38.9,-77.0"}
    async with mesh.http.post("/popmesh/explain", json=body, headers=near_iad) as response:
        plan = await response.json()
    assert plan["client"]["source"] == "header"
    assert (plan["route"]["prefill"], plan["route"]["decode"]) == ("iad-1", "iad-1")
    total = sum(reason["seconds"] for reason in plan["route"]["reasons"])
    assert total == pytest.approx(plan["route"]["cost_s"])
    async with mesh.http.post("/popmesh/explain", json=body) as response:
        here = await response.json()
    assert here["client"]["source"] == "router"
    assert here["route"]["prefill"] == "fra-1"
    assert not any(node.submits for node in mesh.nodes.values())


@pytest.mark.parametrize("bad", ["", "1", "91,0", "0,181", "a,b", "1,2,3", "nan,0", "inf,0"])
async def test_a_trusted_edge_must_send_a_position(mesh: RouterMesh, bad: str) -> None:
    response = await mesh.chat(headers={"x-popmesh-client-geo": bad})
    assert response.status == 400
    assert (await response.json())["error"]["param"] == "x-popmesh-client-geo"


async def test_a_cached_prefix_attracts(mesh: RouterMesh) -> None:
    words = "a long prompt " * 400
    first = await mesh.chat(messages=[{"role": "user", "content": words}], max_tokens=2)
    assert first.headers["x-popmesh-prefill"] == "fra-1"
    chain = mesh.nodes["fra-1"].submits[0].chain
    assert len(chain) > 10
    mesh.nodes["iad-1"].tell(cache_delta(MODEL, chain, 64))
    while True:
        body = {"model": MODEL, "messages": [{"role": "user", "content": words + "more"}]}
        async with mesh.http.post("/popmesh/explain", json=body) as response:
            plan = await response.json()
        if plan["cached_tokens"]:
            break
        await asyncio.sleep(0.01)
    assert (plan["route"]["prefill"], plan["route"]["decode"]) == ("iad-1", "iad-1")


async def test_drained_in_the_directory_takes_nothing_new(mesh: RouterMesh) -> None:
    from tests.router.router_mesh import entry_of

    nodes = mesh.nodes
    mesh.directory.list(entry_of(node, drain=node.name != "iad-1") for node in nodes.values())
    response = await mesh.chat()
    assert response.headers["x-popmesh-prefill"] == "iad-1"


async def test_an_empty_registry_does_not_stop_live_links(mesh: RouterMesh) -> None:
    mesh.directory.list([])
    response = await mesh.chat()
    assert response.status == 200


async def test_metrics_and_status(mesh: RouterMesh) -> None:
    await (await mesh.chat(max_tokens=3)).json()
    text = await (await mesh.http.get("/metrics")).text()
    assert 'popmesh_requests_total{outcome="length"} 1' in text
    assert 'popmesh_tokens_total{kind="completion"} 3' in text
    assert 'popmesh_link_up{node="fra-1"} 1' in text
    status = await mesh.get_json("/popmesh/status")
    assert status["routable"] == [MODEL]
    assert {node["name"] for node in status["nodes"]} == set(mesh.nodes)


async def test_metrics_count_lost_links_and_what_came_for_nobody(mesh: RouterMesh) -> None:
    node = mesh.nodes["iad-1"]
    node.tell(Loading(99, 2000))  # of a stream that nobody knows
    await node.wait_until(lambda: node.cancels == [99])
    first = node.connections[0]
    first.drop()
    await node.wait_until(lambda: any(one is not first for one in node.connections))
    text = await (await mesh.http.get("/metrics")).text()
    assert 'popmesh_link_unknown_stream_messages_total{node="iad-1"} 1\n' in text
    assert 'popmesh_link_reconnects_total{node="iad-1"} 1\n' in text
    assert 'popmesh_link_reconnects_total{node="fra-1"} 0\n' in text


async def test_stop_lets_running_streams_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_mesh(monkeypatch, make_topology()) as mesh:
        lhr = mesh.nodes["lhr-1"]
        lhr.go.clear()
        response = await mesh.chat(stream=True)
        mesh.stop.set()
        await asyncio.sleep(0)
        lhr.go.set()
        chunks = await events(response)
        assert text_of(chunks) == answer_text(HELLO, 8)
        assert chunks[-1] == "[DONE]"


async def test_limits_per_tenant_and_router(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(in_flight=2, per_tenant=1, shutdown_s=5.0)
    async with running_mesh(monkeypatch, limits=limits) as mesh:
        fra = mesh.nodes["fra-1"]
        fra.go.clear()
        first = asyncio.ensure_future(mesh.chat())
        await fra.wait_until(lambda: fra.active == 1)
        second = await mesh.chat()
        assert second.status == 429
        assert second.headers["Retry-After"] == "1"
        fra.go.set()
        assert (await first).status == 200
        assert (await mesh.chat()).status == 200


async def test_one_model_by_name(mesh: RouterMesh) -> None:
    async with openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none") as client:
        (listed,) = (await client.models.list()).data
        assert await client.models.retrieve(MODEL) == listed
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("gpt/zz")
        assert caught.value.code == "model_not_found"
        assert MODEL in caught.value.message


async def test_stop_ends_kept_connections_after_their_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_mesh(monkeypatch, make_topology()) as mesh:
        lhr = mesh.nodes["lhr-1"]
        lhr.go.clear()
        running = await mesh.chat(stream=True)
        await mesh.get_json("/health")  # on a second connection, which the client keeps
        mesh.stop.set()
        await asyncio.sleep(0)
        kept = await mesh.http.get("/health")
        assert kept.status == 200
        assert kept.headers["Connection"] == "close"
        lhr.go.set()
        assert (await events(running))[-1] == "[DONE]"
