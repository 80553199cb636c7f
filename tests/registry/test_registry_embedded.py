"""The embedded registry's HTTP surface: what it refuses, its bounds, and how it stops."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from registry import embedded
from registry.client import Registry
from registry.consul_json import parse_duration_s, parse_registration
from registry.embedded import EmbeddedRegistry
from registry.entries import Registration
from registry.state import Limits, RegisterService, TtlCheck
from wire.errors import ConfigError, PeerError


@pytest.fixture
async def http(embedded_url: str) -> AsyncIterator[aiohttp.ClientSession]:
    base = embedded_url.replace("consul://", "http://")
    async with aiohttp.ClientSession(base) as session:
        yield session


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_off_loopback_it_refuses_to_exist(host: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        EmbeddedRegistry(host)


async def test_a_taken_port_is_a_clear_error(embedded_url: str) -> None:
    port = int(embedded_url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*another port"):
        await EmbeddedRegistry(port=port).start()


async def test_ipv6_loopback_works() -> None:
    server = EmbeddedRegistry("::1")
    url = await server.start()
    assert url.startswith("consul://[::1]:")
    async with Registry.connect(url) as registry:
        await registry.kv_put("k", b"v")
    await server.stop()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "192.0.2.1"])
async def test_a_page_that_points_its_name_at_loopback_gets_nothing(
    http: aiohttp.ClientSession, host: str
) -> None:
    async with http.get("/v1/status/leader", headers={"Host": host}) as answer:
        assert answer.status == 403


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/kv/a", 405),
        ("GET", "/v1/kv/", 400),
        ("GET", "/v1/kv/a?keys=1", 400),
        ("GET", "/v1/health/service/s?passing=1", 400),
        ("GET", "/v1/health/service/s?index=x", 400),
        ("GET", "/v1/health/service/s?index=-1", 400),
        ("GET", "/v1/health/service/s?index=1&wait=soon", 400),
        ("GET", "/v1/health/service/s?index=1&wait=-5s", 400),
        ("GET", "/v1/health/service/s?dc=mars", 500),
        ("PUT", "/v1/kv/a?cas=0", 400),
        ("PUT", "/v1/agent/check/pass/serfHealth", 500),
        ("PUT", "/v1/agent/check/hug/service:a", 404),
    ],
)
async def test_what_it_does_not_know_it_refuses(
    http: aiohttp.ClientSession, method: str, path: str, status: int
) -> None:
    async with http.request(method, path) as answer:
        assert answer.status == status


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"name": ""}',
        b'{"name": 3}',
        b'{"name": "s", "port": 70000}',
        b'{"name": "s", "port": -1}',
        b'{"name": "s", "surprise": 1}',
        b'{"name": "s", "tags": ["ignored?"]}',
        b'{"name": "s", "check": {"ttl": "soon"}}',
        b'{"name": "s", "check": {"ttl": "0s"}}',
        b'{"name": "s", "check": {"ttl": "99999h"}}',
        b'{"name": "s", "check": {"http": "http://x", "interval": "1s"}}',
        b'{"name": "s", "check": {"ttl": "1s", "status": "fine"}}',
        b'{"name": "s", "check": {"ttl": "1s"}, "checks": [{"ttl": "1s"}]}',
        b'{"name": "s", "meta": {"k": 1}}',
        b'\xff{"name": "s"}',
    ],
    ids=lambda body: repr(body[:60]),
)
async def test_impossible_registrations_are_refused(
    http: aiohttp.ClientSession, body: bytes
) -> None:
    async with http.put("/v1/agent/service/register", data=body) as answer:
        assert answer.status == 400, await answer.text()
    async with http.get("/v1/health/service/s") as answer:
        assert await answer.json() == []


def test_field_names_are_read_as_consul_reads_them() -> None:
    body = {
        "Name": "s",
        "ID": "a",
        "Meta": {"Keep_Case": "x"},
        "Check": {"TTL": "1m0.5s", "deregister_critical_service_after": "90s"},
    }
    assert parse_registration(json.dumps(body).encode()) == RegisterService(
        "a", "s", "", 0, {"Keep_Case": "x"}, TtlCheck(60.5, None, 90.0)
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("10s", 10.0), ("1h2m3s", 3723.0), ("1.5m", 90.0), ("0s", 0.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "10", "s", "-1s", "1s ", "1 s", "1d", "١s", "1e3s"])
def test_impossible_durations(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration_s(text)


async def test_a_check_can_be_updated_by_its_body(http: aiohttp.ClientSession) -> None:
    registration = {"name": "s", "check": {"ttl": "60s"}}
    async with http.put("/v1/agent/service/register", json=registration) as answer:
        assert answer.status == 200
    update = {"Status": "warning", "Output": "hot"}
    async with http.put("/v1/agent/check/update/service:s", json=update) as answer:
        assert answer.status == 200
    async with http.get("/v1/health/service/s") as answer:
        (check,) = (await answer.json())[0]["Checks"]
        assert (check["Status"], check["Output"]) == ("warning", "hot")
    async with http.put("/v1/agent/check/update/service:s", json={"Status": "fine"}) as answer:
        assert answer.status == 400
    async with http.put("/v1/agent/check/update/service:t", json=update) as answer:
        assert answer.status == 500


async def test_a_body_over_the_limit_is_refused(http: aiohttp.ClientSession) -> None:
    async with http.put("/v1/kv/a", data=io.BytesIO(bytes(embedded.MAX_BODY_BYTES + 1))) as answer:
        assert answer.status == 413
    async with http.get("/v1/kv/a") as answer:
        assert answer.status == 404


async def test_a_full_registry_says_so() -> None:
    server = EmbeddedRegistry(limits=Limits(max_keys=1))
    async with Registry.connect(await server.start()) as registry:
        await registry.kv_put("a", b"1")
        with pytest.raises(PeerError, match="more than 1 keys"):
            await registry.kv_put("b", b"1")
    await server.stop()


async def until_waiting(server: EmbeddedRegistry, count: int) -> None:
    """Let the loop turn until so many queries wait at the server; the test's timeout bounds it."""
    while server.num_waiters != count:  # noqa: ASYNC110  # the server offers no event for it
        await asyncio.sleep(0)


async def test_waiting_queries_are_bounded_and_those_that_went_away_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "MAX_WAITERS", 2)
    server = EmbeddedRegistry()
    async with Registry.connect(await server.start()) as registry:
        waiters = [
            asyncio.create_task(registry.services("s", wait_index=1, wait_s=60)) for _ in range(2)
        ]
        await until_waiting(server, 2)
        with pytest.raises(PeerError, match="too many blocking queries"):
            await registry.services("s", wait_index=1, wait_s=60)
        await registry.services("s")  # one that need not wait is served
        waiters[0].cancel()
        await until_waiting(server, 1)
        assert (await registry.services("s", wait_index=1, wait_s=0.01)).entries == ()
        waiters[1].cancel()
        await until_waiting(server, 0)
    await server.stop()


async def test_stopping_answers_what_waits() -> None:
    server = EmbeddedRegistry()
    async with Registry.connect(await server.start()) as registry:
        await registry.register(Registration("a", "s", "127.0.0.1", 1, {}, 30, 60), "passing")
        snapshot = await registry.services("s")
        waiting = asyncio.create_task(registry.services("s", wait_index=snapshot.index, wait_s=60))
        await until_waiting(server, 1)
        await server.stop()
        assert await waiting == snapshot
        with pytest.raises(PeerError):
            await registry.leader()


async def test_stopping_twice_or_unstarted_is_harmless() -> None:
    server = EmbeddedRegistry()
    await server.stop()
    server = EmbeddedRegistry()
    await server.start()
    await server.stop()
    await server.stop()
