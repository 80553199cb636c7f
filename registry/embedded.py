"""The embedded registry: the part of Consul's HTTP API that a mesh on one machine needs.

A thin aiohttp server over ``registry.state``; what it says means what Consul means by it, checked
by running the same contract tests against both. It has no authentication, so it listens on loopback
only and answers only requests addressed to loopback (a web page cannot reach it through a name that
it points there). What it does not know, it refuses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from registry import consul_json
from registry.consul_json import DATACENTER
from registry.entries import Status
from registry.state import (
    Command,
    DeleteKey,
    DeregisterService,
    Limits,
    PutKey,
    Refused,
    RegistryState,
    UpdateCheck,
)
from wire.address import format_address, is_loopback
from wire.errors import ConfigError

MAX_WAIT_S = 60.0
"""Longest blocking query, whatever was asked for: our client never waits longer."""

MAX_WAITERS = 1024
"""Blocking queries at once; each holds a connection and its buffers. Guess."""

MAX_BODY_BYTES = 1024 * 1024
"""Largest body read: twice the largest value of a key."""

STOP_WITHIN_S = 1.0
"""How long stopping waits for answers under way. Waiting queries are answered at once."""

_HTTP_STATUS_OF = {"unknown_check": 500, "too_large": 413, "full": 429}
_STATUS_OF_VERB: dict[str, Status] = {"pass": "passing", "warn": "warning", "fail": "critical"}

C = TypeVar("C", bound=Command)

Read = Callable[[], tuple[int, list[dict[str, Any]]]]


class EmbeddedRegistry:
    """A registry server on a loopback address, with all its state in memory."""

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *, limits: Limits | None = None
    ) -> None:
        """``port`` 0 means any free one. Raises ``ConfigError`` off loopback."""
        if not is_loopback(host):
            raise ConfigError(
                f"the embedded registry cannot listen on {host}: it has no authentication",
                suggestion="use a loopback address, or run Consul",
            )
        self._host = host
        self._port = port
        self._state = RegistryState(limits)
        self._runner: web.AppRunner | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()  # replaced at each change, so that each wakes all waiters
        self._num_waiters = 0
        self._stopping = False

    @property
    def num_waiters(self) -> int:
        """Blocking queries that wait now."""
        return self._num_waiters

    async def start(self) -> str:
        """Listen; the URL to reach it, ``consul://HOST:PORT``. Raises ``ConfigError``."""
        app = web.Application(middlewares=[_guard], client_max_size=MAX_BODY_BYTES)
        app.router.add_put("/v1/agent/service/register", self._register)
        app.router.add_put("/v1/agent/service/deregister/{service_id:.+}", self._deregister)
        app.router.add_put("/v1/agent/check/{verb:pass|warn|fail}/{check_id:.+}", self._report)
        app.router.add_put("/v1/agent/check/update/{check_id:.+}", self._update)
        app.router.add_get("/v1/agent/self", self._self)
        app.router.add_get("/v1/health/service/{name:.+}", self._health)
        app.router.add_get("/v1/kv/{key:.*}", self._get)
        app.router.add_put("/v1/kv/{key:.+}", self._put)
        app.router.add_delete("/v1/kv/{key:.+}", self._delete)
        app.router.add_get("/v1/status/leader", self._leader)
        # A client that goes away cancels its waiting query.
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_WITHIN_S
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as exc:
            await self._runner.cleanup()
            where = format_address(self._host, self._port)
            raise ConfigError(
                f"cannot listen: {exc.strerror}", where=where, suggestion="choose another port"
            ) from exc
        self._port = self._runner.addresses[0][1]
        return f"consul://{format_address(self._host, self._port)}"

    async def stop(self) -> None:
        """Answer what waits, close all connections, forget everything."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        self._wake()
        if self._runner is not None:
            await self._runner.cleanup()

    # ---- time and change -----------------------------------------------------------------------

    def _command(self, command: Command) -> None:
        """Carry out a command; a refusal becomes the HTTP error."""
        before = self._state.index
        refused = self._state.handle(command, asyncio.get_running_loop().time())
        self._after(before)
        if isinstance(refused, Refused):
            raise _Problem(_HTTP_STATUS_OF[refused.reason], refused.text)

    def _expire(self) -> None:
        before = self._state.index
        self._state.expire(asyncio.get_running_loop().time())
        self._after(before)

    def _after(self, index_before: int) -> None:
        """Wake the waiters if something changed, and set the one timer."""
        if self._state.index != index_before:
            self._wake()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._state.next_deadline()
        if deadline is not None and not self._stopping:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._expire)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _reading(self, request: web.Request, read: Read) -> tuple[int, list[dict[str, Any]]]:
        """A reading, at once or as soon as its index exceeds the one that the client has."""
        index, wait_s = _blocking(request)
        answer = read()
        # An index that was never given out comes from before a restart: no use in waiting.
        if index == 0 or index > self._state.index or answer[0] > index:
            return answer
        if self._num_waiters >= MAX_WAITERS:
            raise _Problem(429, "too many blocking queries")
        self._num_waiters += 1
        try:
            async with asyncio.timeout(wait_s):
                while answer[0] <= index and not self._stopping:
                    await self._changed.wait()
                    answer = read()
        except TimeoutError:
            pass
        finally:
            self._num_waiters -= 1
        return answer

    # ---- requests ------------------------------------------------------------------------------

    async def _register(self, request: web.Request) -> web.Response:
        _only(request)
        self._command(_parsed(consul_json.parse_registration, await request.read()))
        return web.Response()

    async def _deregister(self, request: web.Request) -> web.Response:
        _only(request)
        self._command(DeregisterService(request.match_info["service_id"]))
        return web.Response()

    async def _report(self, request: web.Request) -> web.Response:
        _only(request, "note")
        status = _STATUS_OF_VERB[request.match_info["verb"]]
        self._command(UpdateCheck(_service_id(request), status, request.query.get("note", "")))
        return web.Response()

    async def _update(self, request: web.Request) -> web.Response:
        _only(request)
        service_id = _service_id(request)
        parse = partial(consul_json.parse_check_update, service_id)
        self._command(_parsed(parse, await request.read()))
        return web.Response()

    async def _health(self, request: web.Request) -> web.Response:
        _only(request, "dc", "index", "wait")
        name = request.match_info["name"]
        index, body = await self._reading(request, lambda: consul_json.health(self._state, name))
        return _json(body, index=index)

    async def _get(self, request: web.Request) -> web.Response:
        _only(request, "dc", "index", "wait", "recurse")
        key = request.match_info["key"]
        recurse = "recurse" in request.query
        if not key and not recurse:
            raise _Problem(400, "Missing key name")
        read = self._state.keys if recurse else self._state.key
        index, body = await self._reading(request, lambda: consul_json.keys(read(key)))
        if not body:
            return web.Response(status=404, headers={"X-Consul-Index": str(index)})
        return _json(body, index=index)

    async def _put(self, request: web.Request) -> web.Response:
        _only(request, "dc")
        self._command(PutKey(request.match_info["key"], await request.read()))
        return _json(True)

    async def _delete(self, request: web.Request) -> web.Response:
        _only(request, "dc")
        self._command(DeleteKey(request.match_info["key"]))
        return _json(True)

    async def _self(self, request: web.Request) -> web.Response:
        _only(request)
        return _json(consul_json.agent_self())

    async def _leader(self, request: web.Request) -> web.Response:
        _only(request)
        return _json(format_address(self._host, self._port))


class _Problem(Exception):
    """A request that cannot be served: the HTTP status and the text of the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text


@web.middleware
async def _guard(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse requests addressed to another host name (DNS rebinding); answer refusals as text."""
    # URL.host is None for a request without a Host header, which no HTTP/1.1 client sends.
    if not is_loopback(request.url.host or ""):
        return web.Response(status=403, text="the embedded registry answers on loopback only")
    try:
        return await handler(request)
    except _Problem as problem:
        return web.Response(status=problem.status, text=problem.text)


def _parsed(parse: Callable[[bytes], C], body: bytes) -> C:
    try:
        return parse(body)
    except (ValueError, RecursionError, msgspec.ValidationError) as exc:
        raise _Problem(400, f"Request decode failed: {exc}") from exc


def _only(request: web.Request, *known: str) -> None:
    """Refuse query parameters that would have no effect, and datacenters that do not exist."""
    for name in request.query:
        if name not in known:
            raise _Problem(400, f"the embedded registry does not know the parameter {name!r}")
    if request.query.get("dc", DATACENTER) != DATACENTER:
        raise _Problem(500, "No path to datacenter")


def _blocking(request: web.Request) -> tuple[int, float]:
    """The client's index (0: none) and how long to wait for a higher one, in seconds."""
    index = request.query.get("index", "0")
    if not (index.isascii() and index.isdigit() and len(index) <= 20):
        raise _Problem(400, "Invalid index")
    try:
        wait_s = consul_json.parse_duration_s(request.query.get("wait", f"{MAX_WAIT_S}s"))
    except ValueError as exc:
        raise _Problem(400, "Invalid wait time") from exc
    return int(index), min(wait_s, MAX_WAIT_S)


def _service_id(request: web.Request) -> str:
    """The service that a check belongs to: each has one check, named after it."""
    check_id = request.match_info["check_id"]
    if not check_id.startswith("service:"):
        raise _Problem(500, f'CheckID "{check_id}" does not have associated TTL')
    return check_id.removeprefix("service:")


def _json(body: object, *, index: int | None = None) -> web.Response:
    headers = {} if index is None else {"X-Consul-Index": str(index)}
    return web.json_response(body, headers=headers)
