"""What a request for the model API says: who asks, from where, for what, and by which route.

It reads and measures; what becomes of the request is decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from router.api.parse import parse_chat, parse_completion
from router.api.types import ApiKind, ParsedRequest
from router.dispatch import Dispatch
from router.http.auth import Authenticator, Caller
from router.request.admission import MAX_BODY_BYTES, Limits
from router.routing.geo import GEO_HEADER, ClientLocator, ClientPlace
from router.routing.policy import Pin, RouteRequest
from router.routing.refusals import ROUTE_HEADER
from wire.errors import RequestError

_PARSERS: dict[ApiKind, Callable[[bytes], ParsedRequest]] = {
    "chat": parse_chat,
    "completion": parse_completion,
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that passed every check short of finding a route."""

    parsed: ParsedRequest
    caller: Caller
    place: ClientPlace
    routing: RouteRequest
    chain: list[bytes]
    prompt_bytes: int


class RequestReader:
    """Reads requests for one router."""

    def __init__(
        self,
        dispatch: Dispatch,
        authenticator: Authenticator,
        locator: ClientLocator,
        limits: Limits,
    ) -> None:
        self._dispatch = dispatch
        self._auth = authenticator
        self._locator = locator
        self._limits = limits

    def caller(self, request: web.Request) -> Caller:
        """Who asks; raises ``MeshError`` for whom is not known."""
        return self._auth.client(request.headers.get("Authorization"), peer_of(request))

    async def prepare(
        self, request: web.Request, kind: ApiKind, caller: Caller | None = None
    ) -> Prepared:
        """Authenticate (unless that is done), read, parse, place and measure a request.

        Raises ``MeshError``.
        """
        caller = caller or self.caller(request)
        parsed = await self.parse(request, kind)
        place = self.place(request)
        pin = pin_of(request, caller)
        work, chain, prompt_bytes = self._dispatch.measure(
            parsed.model, caller.tenant, parsed.input, parsed.max_tokens
        )
        self._check_max_tokens(parsed)
        routing = RouteRequest(
            *(work, place.position, caller.regions, pin),
            deadline=self.deadline(),
            wire_version=parsed.sampling(0).needed_version,
        )
        return Prepared(parsed, caller, place, routing, chain, prompt_bytes)

    async def parse(self, request: web.Request, kind: ApiKind) -> ParsedRequest:
        """The body; raises ``RequestError``."""
        return _PARSERS[kind](await self.read_body(request))

    def deadline(self) -> float:
        """Of an attempt to answer that begins now."""
        return asyncio.get_running_loop().time() + self._limits.request_timeout_s

    async def read_body(self, request: web.Request) -> bytes:
        """A body of bounded size that comes in bounded time; raises ``RequestError``."""
        too_large = RequestError(
            f"the body exceeds {MAX_BODY_BYTES // 2**20} MiB", code="request_too_large"
        )
        if (request.content_length or 0) > MAX_BODY_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                return await request.read()
        except TimeoutError as exc:
            raise RequestError(
                f"the body was not complete after {self._limits.body_timeout_s:g} s",
                code="request_timeout",
            ) from exc
        except web.HTTPRequestEntityTooLarge as exc:
            raise too_large from exc
        except web.RequestPayloadError as exc:
            reason = (
                str(exc).rpartition("message:")[2].strip()
            )  # aiohttp puts "400, message:" first
            raise RequestError(f"the body cannot be read: {reason}") from exc

    def place(self, request: web.Request) -> ClientPlace:
        """Where the client is."""
        place = self._locator.place(peer_of(request), request.headers.get(GEO_HEADER))
        if place.ignored_header:
            self._dispatch.metrics.ignored_geo.add()
        return place

    def _check_max_tokens(self, parsed: ParsedRequest) -> None:
        """Refuse more output than any node's context could hold, before any node is asked."""
        view = self._dispatch.builder.snapshot()
        contexts = [
            view.nodes[name].offers[parsed.model].context_tokens
            for name in view.offered.get(parsed.model, ())
        ]
        if contexts and parsed.max_tokens is not None and parsed.max_tokens > max(contexts):
            raise RequestError(
                f"max_tokens is {parsed.max_tokens}, but the context of {parsed.model} is "
                f"{max(contexts)} tokens",
                code="invalid_value",
                param="max_tokens",
            )


def peer_of(request: web.Request) -> str:
    """IP address of the other end as text; empty when unknown."""
    transport = request.transport
    peername = None if transport is None else transport.get_extra_info("peername")
    return str(peername[0]) if isinstance(peername, tuple) else ""


def pin_of(request: web.Request, caller: Caller) -> Pin:
    """``prefill=NAME,decode=NAME`` (either may be missing) -> ``Pin``; raises ``RequestError``."""
    header = request.headers.get(ROUTE_HEADER)
    if header is None:
        return Pin()
    if not caller.operator:
        raise RequestError(
            f"{ROUTE_HEADER} needs an operator's key", code="forbidden", param=ROUTE_HEADER
        )
    chosen: dict[str, str] = {}
    for item in header.split(","):
        role, equals, name = (part.strip() for part in item.partition("="))
        if role not in ("prefill", "decode") or role in chosen or not equals or not name:
            raise RequestError(
                f"{ROUTE_HEADER} must be prefill=NAME,decode=NAME; got {header[:80]!r}",
                code="invalid_value",
                param=ROUTE_HEADER,
            )
        chosen[role] = name
    return Pin(chosen.get("prefill"), chosen.get("decode"))
