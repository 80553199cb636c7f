"""Puts a router together and runs it: directory, links, HTTP.

``serve`` owns every task and socket of the process; when it returns, nothing is left.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from registry.client import Registry
from registry.watcher import Watcher
from router.dispatch import Dispatch
from router.http.auth import Authenticator
from router.http.completions import ModelApi
from router.http.guard import GuardedHandler, error_response
from router.http.operator_api import OperatorApi
from router.http.reading import RequestReader
from router.links.link_words import LinkIdentity
from router.links.node_links import SERVICE, LinkPool
from router.placement.placer import Placer
from router.request.admission import MAX_BODY_BYTES, Admission, Limits
from router.router_metrics import RouterMetrics
from router.routing.geo import ClientLocator
from router.routing.view_builder import ViewBuilder
from topology.model import Topology
from wire.address import Dialer, format_address, is_loopback
from wire.errors import ConfigError, MeshError, RequestError
from wire.tls import Credentials

log = logging.getLogger(__name__)

KEEPALIVE_S = 75.0
"""Idle time of a kept client connection. Source: nginx's default."""

LINGER_S = 2.0
"""How long a refused body is still read, so that the client sees the refusal and not a reset."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Everything a router needs to start. ``cache_key`` None draws one for this start, ``https``
    None serves clients without TLS."""

    name: str
    topology: Topology
    registry_url: str
    listen_host: str
    listen_port: int
    credentials: Credentials | None = None
    dialer: Dialer = field(default_factory=Dialer)
    mmdb: Path | None = None
    cache_key: bytes | None = None
    https: ssl.SSLContext | None = None
    limits: Limits = field(default_factory=Limits)


async def serve(
    config: RouterConfig,
    ready: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a router until ``stop`` is set (graceful) or the task is cancelled (at once).

    ``ready`` is called with the base URL once the listener is open. Raises ``ConfigError``.
    """
    placed = config.topology.routers.get(config.name)
    if placed is None:
        known = ", ".join(config.topology.routers) or "none"
        raise ConfigError(
            f"the topology has no router {config.name!r}",
            where=config.topology.source or None,
            suggestion=f"routers there: {known}",
        )
    rng = random.SystemRandom()
    identity = LinkIdentity(
        mesh=config.topology.mesh,
        name=config.name,
        site=placed.site,
        incarnation=secrets.token_hex(8),
        dialer=config.dialer,
        credentials=config.credentials,
    )
    home = config.topology.sites[placed.site].position
    locator = ClientLocator(home, config.topology.trusted_networks, config.mmdb)
    listener = _bind(config.listen_host, config.listen_port)
    try:
        async with Registry.connect(config.registry_url) as registry, asyncio.TaskGroup() as group:
            builder = ViewBuilder(config.topology, placed.site)
            pool = LinkPool(config.topology, identity, builder, group, rng)
            dispatch = Dispatch(
                builder=builder,
                pool=pool,
                admission=Admission(config.limits),
                cache_key=config.cache_key or secrets.token_bytes(32),
                rng=rng,
                metrics=RouterMetrics(),
            )
            watcher = Watcher(registry, SERVICE, lambda seen: pool.follow(seen.entries))
            placer = Placer(config.topology, builder, pool, dispatch.metrics)
            following = group.create_task(watcher.run(), name="registry watch")
            placing = group.create_task(placer.run(), name="placement")
            try:
                await _serve_http(config, listener, dispatch, watcher, placer, locator, ready, stop)
            finally:
                following.cancel()
                placing.cancel()
                for exchange in list(dispatch.running):
                    exchange.abandon()
                pool.close()
    finally:
        listener.close()
        locator.close()


def _bind(host: str, port: int) -> socket.socket:
    """The listening socket, before anything else starts; raises ``ConfigError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as exc:
        raise ConfigError(
            f"cannot listen on {format_address(host, port)}: {exc.strerror}",
            suggestion="choose another --listen address; port 0 takes any free one",
        ) from exc


async def _serve_http(
    config: RouterConfig,
    listener: socket.socket,
    dispatch: Dispatch,
    watcher: Watcher,
    placer: Placer,
    locator: ClientLocator,
    ready: Callable[[str], None] | None,
    stop: asyncio.Event | None,
) -> None:
    """Listen until told to stop, then finish what runs within ``limits.shutdown_s``."""
    limits = config.limits
    authenticator = Authenticator(config.topology.tenants.values())
    reader = RequestReader(dispatch, authenticator, locator, limits)
    models = ModelApi(dispatch, placer, reader, int(time.time()))
    operators = OperatorApi(config.name, dispatch, watcher, placer, authenticator, models, reader)
    loop = asyncio.get_running_loop()
    runner = web.AppRunner(
        _application(models, operators), handler_cancellation=True, access_log=None
    )
    await runner.setup()
    manager = runner.server
    assert manager is not None

    def connection() -> GuardedHandler:
        return GuardedHandler(
            manager,
            limits.head_timeout_s,
            loop=loop,
            keepalive_timeout=KEEPALIVE_S,
            lingering_time=LINGER_S,
            access_log=None,
        )

    try:
        patience_s = limits.head_timeout_s if config.https is not None else None
        server = await loop.create_server(
            connection, sock=listener, ssl=config.https, ssl_handshake_timeout=patience_s
        )
        host, port = listener.getsockname()[:2]
        scheme = "http" if config.https is None else "https"
        url = f"{scheme}://{format_address(host, port)}"
        log.info("router %s listens on %s", config.name, url)
        if config.https is None and not is_loopback(host):
            log.warning("keys and prompts of clients come in the clear: end their TLS before here")
        try:
            if ready is not None:
                ready(url)
            await (stop or asyncio.Event()).wait()
            operators.stopping = True
        finally:
            server.close()
        await _drained(dispatch, limits.shutdown_s)
    finally:
        await runner.cleanup()
        models.resumer.close()


async def _drained(dispatch: Dispatch, patience_s: float) -> None:
    """Wait until no request is in flight, at most ``patience_s``."""
    try:
        async with asyncio.timeout(patience_s):
            await dispatch.admission.wait_idle()
    except TimeoutError:
        log.warning("stopping with %d requests unfinished", dispatch.admission.in_flight)


def _application(models: ModelApi, operators: OperatorApi) -> web.Application:
    app = web.Application(middlewares=[_errors], client_max_size=MAX_BODY_BYTES)
    app.on_response_prepare.append(operators.close_when_stopping)
    app.router.add_get("/v1/models", models.models)
    app.router.add_get("/v1/models/{name:.+}", models.model)
    app.router.add_post("/v1/chat/completions", models.chat)
    app.router.add_post("/v1/completions", models.completions)
    app.router.add_get("/health", operators.health)
    app.router.add_get("/ready", operators.ready)
    app.router.add_get("/metrics", operators.metrics)
    app.router.add_get("/popmesh/status", operators.status)
    app.router.add_get("/popmesh/placement", operators.placement)
    app.router.add_post("/popmesh/explain", operators.explain)
    app.router.add_post("/popmesh/drill", operators.drill)
    app.router.add_get("/popmesh/requests/{id}", operators.request_record)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as an OpenAI-shaped answer; tells the connection when a request begins and
    ends."""
    connection = request.protocol
    assert isinstance(connection, GuardedHandler)
    connection.request_begins()
    try:
        return await handler(request)
    except MeshError as exc:
        response = error_response(exc)
        if exc.code in ("request_timeout", "request_too_large"):
            response.force_close()
        return response
    except web.HTTPNotFound:
        return error_response(
            RequestError(f"there is no {request.method} {request.path[:80]}", code="not_found")
        )
    except web.HTTPMethodNotAllowed as exc:
        allowed = ", ".join(sorted(exc.allowed_methods))
        response = error_response(
            RequestError(
                f"{request.path[:80]} takes {allowed}, not {request.method[:20]}",
                code="method_not_allowed",
            )
        )
        response.headers["Allow"] = allowed
        return response
    finally:
        connection.request_ends()
