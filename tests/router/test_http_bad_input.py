"""Clients that are wrong, slow, silent or not allowed: a clear 4xx, and nobody else notices."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator

import pytest

from router.request.admission import MAX_BODY_BYTES, Limits
from tests.fakes.fake_answer import answer_text
from tests.router.router_mesh import MODEL, RouterMesh, make_topology, running_mesh
from topology.model import Tenant
from wire.messages import ChatInput, ChatTurn

QUICK = Limits(head_timeout_s=0.3, body_timeout_s=0.3, shutdown_s=5.0)
GOOD = json.dumps(
    {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture
async def mesh(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RouterMesh]:
    async with running_mesh(monkeypatch, limits=QUICK) as running:
        yield running


async def raw(mesh: RouterMesh, sent: bytes) -> bytes:
    """Send bytes on a connection of their own; everything that comes back until it closes."""
    host, _, port = mesh.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return answer


def split(answer: bytes) -> tuple[int, dict[str, object]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/chat/comp",
        HEAD,
        HEAD + b"Content-Length: 500\r\n\r\n" + GOOD,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
    ],
    ids=["silence", "half-line", "half-head", "half-body", "half-chunk"],
)
async def test_half_requests_end_in_408(mesh: RouterMesh, sent: bytes) -> None:
    status, error = split(await raw(mesh, sent))
    assert status == 408
    assert error["code"] == "request_timeout"
    assert (await mesh.chat(max_tokens=2)).status == 200


async def test_silence_after_an_answer_is_an_idle_connection_not_an_error(
    mesh: RouterMesh,
) -> None:
    host, _, port = mesh.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for _ in range(2):
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200")
        await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
        await asyncio.sleep(QUICK.head_timeout_s * 1.5)
    writer.write(b"GET /hea")  # the next request must come in time again
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 408")
    writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"NONSENSE\r\n\r\n",
        HEAD + b"Content-Length: x\r\n\r\n",
        HEAD + b"Bad Header\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
    ],
)
async def test_malformed_http_is_an_openai_shaped_400(mesh: RouterMesh, sent: bytes) -> None:
    status, error = split(await raw(mesh, sent))
    assert status == 400
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_request"),
        (b"", 400, "invalid_request"),
        (GOOD.replace(b"fake-model", b"gpt-9"), 404, "model_not_found"),
        (GOOD.replace(b'"max_tokens": 3', b'"max_tokens": 1000000'), 400, "invalid_value"),
        (GOOD.replace(b'"max_tokens": 3', b'"n": 4'), 400, "unsupported_parameter"),
        (b"x" * (MAX_BODY_BYTES + 1), 413, "request_too_large"),
    ],
)
async def test_bad_bodies(mesh: RouterMesh, body: bytes, status: int, code: str) -> None:
    async with mesh.http.post("/v1/chat/completions", data=io.BytesIO(body)) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == code
    assert not any(node.submits for node in mesh.nodes.values())


async def test_a_chunked_body_over_the_limit_is_413(mesh: RouterMesh) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(12):
            yield b"x" * 2**20

    async with mesh.http.post("/v1/chat/completions", data=endless()) as response:
        assert response.status == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/popmesh/requests/nope", 404),
    ],
)
async def test_wrong_paths(mesh: RouterMesh, method: str, path: str, status: int) -> None:
    async with mesh.http.request(method, path) as response:
        assert response.status == status
        assert (await response.json())["error"]["message"]


async def test_http_1_0_streams_until_close(mesh: RouterMesh) -> None:
    body = GOOD.replace(b'"max_tokens": 3', b'"max_tokens": 3, "stream": true')
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n" % len(body)
    answer = await raw(mesh, head + body)
    assert b"Transfer-Encoding" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


async def test_a_client_that_reads_nothing_counts_as_gone(mesh: RouterMesh) -> None:
    for node in mesh.nodes.values():
        node.answer_tokens, node.padding = 1000, 30_000  # 30 MB: more than any socket buffer
    host, _, port = mesh.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1)
    body = GOOD.replace(b'"max_tokens": 3', b'"max_tokens": 1000, "stream": true')
    writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    lhr = mesh.nodes["lhr-1"]
    await lhr.wait_until(lambda: bool(lhr.cancels))
    await mesh.wait_idle()
    assert 'outcome="client_gone"} 1' in await (await mesh.http.get("/metrics")).text()
    writer.close()


# ---- tenants -----------------------------------------------------------------------------------


def tenant(name: str, key: str, operator: bool = False, regions: frozenset[str] = frozenset()):  # type: ignore[no-untyped-def]
    return Tenant(name, (hashlib.sha256(key.encode()).hexdigest(),), regions, operator)


async def test_keys_and_residency(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = make_topology(
        tenants=(tenant("acme", "k-acme", regions=frozenset({"na"})), tenant("ops", "k-ops", True))
    )
    async with running_mesh(monkeypatch, topology) as mesh:
        for headers in (None, {"Authorization": "Bearer wrong"}, {"Authorization": "k-acme"}):
            refused = await mesh.chat(headers=headers)
            assert refused.status == 401
            assert (await refused.json())["error"]["code"] == "invalid_api_key"
            assert (await mesh.http.get("/v1/models", headers=headers)).status == 401
        answer = await mesh.chat(headers={"Authorization": "Bearer k-acme"})
        assert answer.headers["x-popmesh-prefill"] == "iad-1"  # fra is nearer, but in eu
        text = (await answer.json())["choices"][0]["message"]["content"]
        assert text == answer_text(ChatInput([ChatTurn("user", "hello")]), 8)
        assert mesh.nodes["iad-1"].submits[0].tenant == "acme"


def remote(monkeypatch: pytest.MonkeyPatch, peer: str) -> None:
    """Pretend that requests come from elsewhere."""
    for module in ("router.http.reading", "router.http.operator_api"):
        monkeypatch.setattr(f"{module}.peer_of", lambda request: peer)


async def test_strangers_cannot_pin_place_or_look(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = make_topology(tenants=(tenant("acme", "k-acme"), tenant("ops", "k-ops", True)))
    async with running_mesh(monkeypatch, topology) as mesh:
        remote(monkeypatch, "203.0.113.9")
        acme = {"Authorization": "Bearer k-acme"}
        ops = {"Authorization": "Bearer k-ops"}
        pin = {"x-popmesh-route": "prefill=iad-1,decode=iad-1"}
        assert (await mesh.chat(headers=acme | pin)).status == 403
        assert (await mesh.chat(headers=ops | pin)).headers["x-popmesh-prefill"] == "iad-1"
        assert (await mesh.chat(headers=acme)).status == 200
        lying = await mesh.chat(headers=acme | {"x-popmesh-client-geo": "nonsense"})
        assert lying.status == 200
        for path in ("/popmesh/status", "/metrics", "/popmesh/requests/x"):
            assert (await mesh.http.get(path)).status == 403
            assert (await mesh.http.get(path, headers=acme)).status == 403
        metrics = await (await mesh.http.get("/metrics", headers=ops)).text()
        assert "popmesh_ignored_geo_headers_total 1" in metrics
        assert (await mesh.http.get("/health")).status == 200
        remote(monkeypatch, "127.0.0.1")


async def test_a_body_that_does_not_unpack_is_the_clients_fault(
    mesh: RouterMesh, caplog: pytest.LogCaptureFixture
) -> None:
    sent = b"Content-Encoding: gzip\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(GOOD)
    status, error = split(await raw(mesh, HEAD + sent + GOOD))
    assert status == 400
    assert error["message"] == "the body cannot be read: Can not decode content-encoding: gzip"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_an_unknown_expectation_is_refused_in_json(mesh: RouterMesh) -> None:
    head = HEAD + b"Content-Length: %d\r\nConnection: close\r\n" % len(GOOD)
    status, error = split(await raw(mesh, head + b"Expect: wonders\r\n\r\n" + GOOD))
    assert (status, error["code"]) == (417, "expectation_failed")
    answer = await raw(mesh, head + b"Expect: 100-Continue\r\n\r\n" + GOOD)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("wish", [b"", b"Connection: keep-alive\r\n"])
async def test_a_stream_to_an_http_1_0_client_ends_with_the_connection(
    mesh: RouterMesh, wish: bytes
) -> None:
    body = GOOD[:-1] + b', "stream": true}'
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + wish
    answer = await raw(mesh, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert b"keep-alive" not in head
    assert events.endswith(b"\n\ndata: [DONE]\n\n")
