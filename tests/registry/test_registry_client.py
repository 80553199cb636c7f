"""The client against URLs that make no sense and servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest
from registry_servers import CannedServer, SilentServer, free_ports, http_answer

from registry import client as client_module
from registry.client import Registry
from registry.entries import Registration
from registry.target import parse_url
from wire.errors import ConfigError, PeerError, error_from_code


@pytest.mark.parametrize(
    ("url", "host", "port", "dc", "token"),
    [
        ("consul://10.0.0.1:8501", "10.0.0.1", 8501, None, None),
        ("http://registry.example", "registry.example", 8500, None, None),
        ("consul://[::1]:1/?dc=eu&token=t%20t", "[::1]", 1, "eu", "t t"),
    ],
)
def test_urls(url: str, host: str, port: int, dc: str | None, token: str | None) -> None:
    target = parse_url(url)
    assert (target.host, target.port, target.dc, target.token) == (host, port, dc, token)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8500",
        "https://127.0.0.1:8500",
        "consul://",
        "consul://host:port",
        "consul://host:99999",
        "consul://host/v1",
        "consul://host?dc",
        "consul://host?dc=",
        "consul://host?dc=a&dc=b",
        "consul://host?datacenter=a",
        "consul://[::1:8500",
    ],
)
def test_impossible_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="consul://HOST:PORT"):
        parse_url(url)


def test_a_token_is_never_shown() -> None:
    assert "s3cret" not in repr(parse_url("consul://host?token=s3cret"))
    for url in (
        "ftp://host?token=s3cret",
        "consul://host?token=s3cret&x=1",
        "consul://h:x?token=s3cret",
    ):
        with pytest.raises(ConfigError) as caught:
            parse_url(url)
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "/", "a//b", "../x", "a/.", "/a", "a/"])
async def test_names_that_a_path_cannot_carry_are_refused(name: str) -> None:
    async with Registry.connect("consul://127.0.0.1:1") as registry:
        for call in (
            registry.kv_get(name),
            registry.kv_put(name, b""),
            registry.kv_delete(name),
            registry.services(name),
            registry.heartbeat(name, "passing"),
            registry.deregister(name),
            registry.register(Registration(name, "s", "127.0.0.1", 1, {}, 1, 60)),
            registry.register(Registration("id", name, "127.0.0.1", 1, {}, 1, 60)),
        ):
            with pytest.raises(ConfigError):
                await call


async def test_nobody_listens() -> None:
    (port,) = free_ports(1)
    async with Registry.connect(f"consul://127.0.0.1:{port}") as registry:
        with pytest.raises(PeerError) as caught:
            await registry.leader()
    assert caught.value.code == "registry_unavailable"
    assert caught.value.retryable
    assert f"127.0.0.1:{port}" in str(caught.value)


def test_the_code_travels_as_a_peer_error() -> None:
    assert type(error_from_code("registry_unavailable", "away")) is PeerError


async def test_every_call_to_a_hanging_registry_ends() -> None:
    async with (
        SilentServer() as server,
        Registry.connect(server.url, timeout_s=0.1) as registry,
    ):
        calls = [
            registry.register(Registration("id", "s", "127.0.0.1", 1, {}, 1, 60)),
            registry.heartbeat("id", "passing"),
            registry.deregister("id"),
            registry.services("s"),
            registry.kv_get("k"),
            registry.kv_put("k", b""),
            registry.kv_delete("k"),
            registry.kv_list("k"),
            registry.leader(),
            registry.datacenter(),
        ]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, PeerError)
        assert (outcome.code, outcome.retryable) == ("registry_unavailable", True)
        assert "no answer within 0.1 s" in str(outcome)


async def test_a_blocking_query_outlasts_its_wait_and_then_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounds: list[float] = []
    real_timeout = asyncio.timeout

    def timeout(delay: float | None) -> asyncio.Timeout:
        if delay is None:  # aiohttp's own, which must not bound anything
            return real_timeout(None)
        bounds.append(delay)
        return real_timeout(0.05)

    async with SilentServer() as server, Registry.connect(server.url) as registry:
        monkeypatch.setattr(client_module.asyncio, "timeout", timeout)
        for wait_index, wait_s in ((0, 30.0), (5, 30.0), (5, 1000.0)):
            with pytest.raises(PeerError):
                await registry.services("s", wait_index=wait_index, wait_s=wait_s)
        monkeypatch.undo()
    assert bounds == pytest.approx([5.0, 35.0, 68.0])


async def test_closing_ends_calls_under_way() -> None:
    async with SilentServer() as server:
        registry = Registry.connect(server.url)
        call = asyncio.create_task(registry.services("s", wait_index=1, wait_s=60))
        await server.wait_connections(1)
        await registry.close()
        with pytest.raises(PeerError):
            await call


def instances(**changes: object) -> bytes:
    service = {"ID": "a", "Service": "s", "Address": "", "Port": 1, "Meta": None}
    body = [{"Node": {"Address": "192.0.2.9"}, "Service": {**service, **changes}, "Checks": []}]
    return json.dumps(body).encode()


async def test_an_instance_without_address_has_that_of_its_consul_node() -> None:
    answer = http_answer(instances(), X_Consul_Index="0")
    async with CannedServer(answer) as server, Registry.connect(server.url) as registry:
        snapshot = await registry.services("s")
    (entry,) = snapshot.entries
    assert (entry.address, entry.meta, entry.status) == ("192.0.2.9", {}, "passing")
    assert snapshot.index == 1, "an index of 0 would make the next wait a busy loop"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        http_answer(b"[]"),  # no index
        http_answer(b"[]", X_Consul_Index="x"),
        http_answer(b"{", X_Consul_Index="1"),
        http_answer(b"\xff\xfe", X_Consul_Index="1"),
        http_answer(b"3", X_Consul_Index="1"),
        http_answer(b"null", X_Consul_Index="1"),
        http_answer(b'["x"]', X_Consul_Index="1"),
        http_answer(instances(Port="1"), X_Consul_Index="1"),
        http_answer(instances(Meta={"k": 1}), X_Consul_Index="1"),
        http_answer(b"[" * 100_000, X_Consul_Index="1"),
        http_answer(b"No cluster leader", "500 Internal Server Error"),
        b"HTTP/1.1 200 OK\r\nX-Consul-Index: 1\r\nContent-Length: 10\r\n\r\n[",
    ],
    ids=lambda answer: repr(answer[:60]),
)
async def test_answers_that_make_no_sense_are_no_answers(answer: bytes) -> None:
    async with CannedServer(answer) as server, Registry.connect(server.url) as registry:
        with pytest.raises(PeerError) as caught:
            await registry.services("s")
    assert (caught.value.code, caught.value.retryable) == ("registry_unavailable", True)


@pytest.mark.parametrize("answer", [b"[3]", b'[{"Key": "k"}]', b'[{"Value": "!"}]', b'{"a": 1}'])
async def test_keys_that_make_no_sense_are_no_answers(answer: bytes) -> None:
    canned = http_answer(answer, X_Consul_Index="1")
    async with CannedServer(canned) as server, Registry.connect(server.url) as registry:
        with pytest.raises(PeerError):
            await registry.kv_list("k")
        with pytest.raises(PeerError):
            await registry.kv_get("k")


async def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_ANSWER_BYTES", 1000)
    answer = http_answer(b"[" + b" " * 2000 + b"]", X_Consul_Index="1")
    async with CannedServer(answer) as server, Registry.connect(server.url) as registry:
        with pytest.raises(PeerError, match="more than 1000 bytes"):
            await registry.services("s")


@pytest.mark.parametrize(
    "status", ["301 Moved Permanently", "400 Bad Request", "403 Forbidden", "413 Too Large"]
)
async def test_refusals_are_not_worth_a_retry(status: str) -> None:
    answer = http_answer(b"no", status, X_Consul_Index="1", Location="/elsewhere")
    async with CannedServer(answer) as server, Registry.connect(server.url) as registry:
        with pytest.raises(PeerError) as caught:
            await registry.services("s")
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("500 Internal Server Error", b'CheckID "service:a" does not have associated TTL'),
        ("500 Internal Server Error", b'Unknown check "service:a"'),
        ("404 Not Found", b'Unknown check ID "service:a"'),
    ],
)
async def test_every_wording_of_an_unknown_check_is_recognised(status: str, text: bytes) -> None:
    canned = http_answer(text, status)
    async with CannedServer(canned) as server, Registry.connect(server.url) as registry:
        assert not await registry.heartbeat("a", "passing")


async def test_a_failing_heartbeat_is_not_taken_for_an_unknown_check() -> None:
    canned = http_answer(b"rpc error: No cluster leader", "500 Internal Server Error")
    async with CannedServer(canned) as server, Registry.connect(server.url) as registry:
        with pytest.raises(PeerError):
            await registry.heartbeat("a", "passing")


def test_the_registry_leaves_torch_and_the_upper_folders_alone() -> None:
    code = (
        "import sys, registry.client, registry.watcher, registry.keeper, registry.embedded\n"
        "bad = {'torch', 'kernels', 'router', 'pop_node', 'popmesh'} & set(sys.modules)\n"
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
