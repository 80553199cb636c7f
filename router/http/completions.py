"""The model API: bodies in, answers out. ``/v1/chat/completions``, ``/v1/completions``,
``/v1/models``.

A thin shell over parse, route and ``Exchange``; every error becomes one OpenAI-shaped answer.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from aiohttp import web

from router.api.event_id import (
    HEADER,
    ID_BYTES,
    ID_PREFIX,
    EventId,
    TextProof,
    drawn_seed,
    parse_event_id,
)
from router.api.parse import parse_chat, parse_completion
from router.api.render import StreamRenderer, whole_answer
from router.api.types import ApiKind, ParsedRequest
from router.dispatch import Dispatch
from router.http.again import UnheardSink, can_be_computed
from router.http.auth import Authenticator, Caller
from router.http.resume import Resumer, Sender
from router.http.sinks import SseSink, WholeSink
from router.http.streaming import route_headers, send_stream
from router.placement.placer import Placer
from router.request.admission import MAX_BODY_BYTES, Limits
from router.request.events import RequestSpec
from router.request.exchange import AnswerSink, Exchange
from router.request.record import RequestRecord
from router.request.resume_book import Resumable
from router.routing.geo import GEO_HEADER, ClientLocator, ClientPlace
from router.routing.policy import Pin, Plan, RouteRequest
from router.routing.refusals import ROUTE_HEADER, check_model, known_models
from wire.errors import MeshError, RequestError

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


class ModelApi:
    """Handlers of the model API."""

    def __init__(
        self,
        dispatch: Dispatch,
        placer: Placer,
        authenticator: Authenticator,
        locator: ClientLocator,
        limits: Limits,
        started_s: int,
    ) -> None:
        self.resumer = Resumer(dispatch)
        self._dispatch = dispatch
        self._placer = placer
        self._auth = authenticator
        self._locator = locator
        self._limits = limits
        self._started_s = started_s

    # ---- handlers -----------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        """``GET /v1/models``: what the topology lists and what nodes offer."""
        self._caller(request)
        names = known_models(self._dispatch.builder.snapshot())
        return web.json_response({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: web.Request) -> web.Response:
        """``GET /v1/models/{name}``: one of them."""
        self._caller(request)
        name = request.match_info["name"]
        check_model(self._dispatch.builder.snapshot(), name)
        return web.json_response(self._model(name))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/chat/completions``."""
        return await self._generate(request, "chat")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/completions``."""
        return await self._generate(request, "completion")

    async def prepare(
        self, request: web.Request, kind: ApiKind, caller: Caller | None = None
    ) -> Prepared:
        """Authenticate (unless that is done), read, parse, place and measure a request.

        Raises ``MeshError``.
        """
        caller = caller or self._caller(request)
        data = await self.read_body(request)
        parsed = _PARSERS[kind](data)
        place = self._place(request)
        pin = _pin(request.headers.get(ROUTE_HEADER), caller)
        work, chain, prompt_bytes = self._dispatch.measure(
            parsed.model, caller.tenant, parsed.input, parsed.max_tokens
        )
        self._check_max_tokens(parsed)
        routing = RouteRequest(
            *(work, place.position, caller.regions, pin),
            deadline=self._deadline(),
            wire_version=parsed.sampling(0).needed_version,
        )
        return Prepared(parsed, caller, place, routing, chain, prompt_bytes)

    # ---- generating ---------------------------------------------------------------------------

    async def _generate(self, request: web.Request, kind: ApiKind) -> web.StreamResponse:
        caller = self._caller(request)
        admission = self._dispatch.admission
        try:
            admission.enter(caller.tenant)
        except MeshError as exc:
            self._dispatch.metrics.refused.add(exc.code)
            raise
        try:
            last_event = request.headers.get(HEADER)
            if last_event:
                return await self._resume(request, kind, caller, last_event)
            return await self._compute(request, kind, caller)
        finally:
            admission.leave(caller.tenant)

    async def _compute(
        self, request: web.Request, kind: ApiKind, caller: Caller, read: EventId | None = None
    ) -> web.StreamResponse:
        """An answer from its beginning; ``read`` says what its client knows of it already."""
        try:
            prepared = await self.prepare(request, kind, caller)
            self._placer.asked(prepared.routing)
            plan = self._dispatch.choose(prepared.routing)
        except MeshError as exc:
            self._dispatch.metrics.refused.add(exc.code)
            raise
        self._dispatch.retry_budget.deposit()
        if prepared.parsed.stream:
            return await self._stream(request, kind, prepared, plan, read)
        return await self._whole(kind, prepared, plan)

    async def _stream(
        self,
        request: web.Request,
        kind: ApiKind,
        prepared: Prepared,
        plan: Plan,
        read: EventId | None,
    ) -> web.StreamResponse:
        parsed, created_s = prepared.parsed, int(time.time())
        spec = self._spec(kind, prepared, None if read is None else read.request_id)
        answer = Resumable(spec, created_s, prepared.prompt_bytes)
        renderer = StreamRenderer(
            kind, spec.request_id, parsed.model, created_s, parsed.include_usage
        )
        record = self._record(spec, prepared.place, None if read is None else read.upto)
        sent = TextProof() if read is None else read.proof
        opening = renderer.opening() if read is None else b""
        sink = SseSink(renderer, answer, _cutter(request), sent, opening)
        hears: AnswerSink = sink
        if read is not None and read.proof is not None:
            hears = UnheardSink(sink, answer, read.proof, self._dispatch.metrics.resumed)
        exchange = Exchange(
            self._dispatch, spec, record, prepared.routing, prepared.prompt_bytes, hears
        )
        sender = Sender(answer, sink, record, exchange)
        return await send_stream(
            request, self.resumer, sender, plan, replay=None if read is None else ()
        )

    async def _resume(
        self, request: web.Request, kind: ApiKind, caller: Caller, header: str
    ) -> web.StreamResponse:
        """The rest of an answer. Of the body only counts how it wants to be answered, unless nobody
        knows the answer: then it is computed again."""
        parsed = _PARSERS[kind](await self.read_body(request))
        if not parsed.stream:
            raise RequestError(
                f"only streamed answers can be resumed; send stream: true, or no {HEADER}",
                code="invalid_value",
                param=HEADER,
            )
        event = parse_event_id(header, kind)
        pin = _pin(request.headers.get(ROUTE_HEADER), caller)
        try:
            answer = await self.resumer.find(caller.tenant, event)
        except RequestError as exc:
            if not can_be_computed(exc, event):
                raise
            return await self._compute(request, kind, caller, event)
        request_id, model = answer.key[1], answer.spec.model
        renderer = StreamRenderer(kind, request_id, model, answer.created_s, parsed.include_usage)
        sink = SseSink(renderer, answer, _cutter(request), event.proof)
        replay = [sink.replayed(escaped, upto) for escaped, upto in answer.after(event)]
        place = self._place(request)
        exchange = None
        if answer.ended is not None:
            record = RequestRecord(request_id, model, caller.tenant, place.source)
            sink.headers(answer.served.prefill, answer.served.decode)
            sink.finish(answer.ended.reason, answer.ended.usage)
        else:
            spec = answer.next_spec(self._deadline())
            work, chain, prompt_bytes = self._dispatch.measure(
                model, caller.tenant, spec.input, spec.sampling.max_tokens
            )
            routing = RouteRequest(
                *(work, place.position, caller.regions, pin),
                deadline=spec.deadline,
                wire_version=spec.sampling.needed_version,
            )
            record = self._record(spec, place, resumed_from=event.upto)
            spec = replace(spec, chain=chain)
            exchange = Exchange(self._dispatch, spec, record, routing, prompt_bytes, sink)
        sender = Sender(answer, sink, record, exchange)
        return await send_stream(request, self.resumer, sender, replay=replay)

    async def _whole(self, kind: ApiKind, prepared: Prepared, plan: Plan) -> web.Response:
        spec, created_s = self._spec(kind, prepared), int(time.time())
        sink = WholeSink()
        record = self._record(spec, prepared.place)
        exchange = Exchange(
            self._dispatch, spec, record, prepared.routing, prepared.prompt_bytes, sink
        )
        try:
            exchange.start(plan)
            ended = await sink.ended
        finally:
            exchange.client_gone()
        if isinstance(ended, MeshError):
            raise ended
        body = whole_answer(
            kind, spec.request_id, spec.model, created_s, ended.escaped, ended.reason, ended.usage
        )
        return web.Response(
            body=body,
            content_type="application/json",
            headers=route_headers(spec.request_id, ended.served),
        )

    def _spec(
        self, kind: ApiKind, prepared: Prepared, request_id: str | None = None
    ) -> RequestSpec:
        """A request; a new one, with an id of its own, where none is given."""
        parsed = prepared.parsed
        request_id = request_id or ID_PREFIX[kind] + secrets.token_hex(ID_BYTES)
        return RequestSpec(
            request_id=request_id,
            model=parsed.model,
            tenant=prepared.caller.tenant,
            input=parsed.input,
            sampling=parsed.sampling(drawn_seed(request_id)),
            chain=prepared.chain,
            deadline=prepared.routing.deadline,
        )

    def _deadline(self) -> float:
        """Of an attempt to answer that begins now."""
        return asyncio.get_running_loop().time() + self._limits.request_timeout_s

    def _record(
        self, spec: RequestSpec, place: ClientPlace, resumed_from: int | None = None
    ) -> RequestRecord:
        record = RequestRecord(spec.request_id, spec.model, spec.tenant, place.source)
        record.resumed_from = resumed_from
        self._dispatch.log.add(record)
        return record

    def _model(self, name: str) -> dict[str, object]:
        """A model as the OpenAI API shows it; ``created`` is when this router started."""
        mesh = self._dispatch.builder.snapshot().topology.mesh
        return {"id": name, "object": "model", "created": self._started_s, "owned_by": mesh}

    # ---- checks -------------------------------------------------------------------------------

    def _caller(self, request: web.Request) -> Caller:
        return self._auth.client(request.headers.get("Authorization"), peer_of(request))

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

    def _place(self, request: web.Request) -> ClientPlace:
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


def _cutter(request: web.Request) -> Callable[[], None]:
    """Cuts the connection of a client that does not read."""

    def cut() -> None:
        if request.transport is not None:
            request.transport.abort()

    return cut


def _pin(header: str | None, caller: Caller) -> Pin:
    """``prefill=NAME,decode=NAME`` (either may be missing) -> ``Pin``; raises ``RequestError``."""
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
