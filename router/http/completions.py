"""The model API: bodies in, answers out. ``/v1/chat/completions``, ``/v1/completions``,
``/v1/models``.

A thin shell over parse, route and ``Exchange``; every error becomes one OpenAI-shaped answer.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace

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
from router.api.render import StreamRenderer, whole_answer
from router.api.types import ApiKind, ParsedRequest
from router.dispatch import Dispatch
from router.http.again import UnheardSink, can_be_computed
from router.http.auth import Caller
from router.http.reading import Prepared, RequestReader, pin_of
from router.http.resume import Resumer, Sender
from router.http.sinks import SseSink, WholeSink
from router.http.streaming import route_headers, send_stream
from router.placement.placer import Placer
from router.request.events import RequestSpec
from router.request.exchange import AnswerSink, Exchange
from router.request.record import RequestRecord
from router.request.resume_book import Resumable
from router.routing.geo import ClientPlace
from router.routing.policy import Plan, RouteRequest
from router.routing.refusals import check_model, known_models
from wire.errors import MeshError, RequestError


class ModelApi:
    """Handlers of the model API."""

    def __init__(
        self, dispatch: Dispatch, placer: Placer, reader: RequestReader, started_s: int
    ) -> None:
        self.resumer = Resumer(dispatch)
        self._dispatch = dispatch
        self._placer = placer
        self._reader = reader
        self._started_s = started_s

    # ---- handlers -----------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        """``GET /v1/models``: what the topology lists and what nodes offer."""
        self._reader.caller(request)
        names = known_models(self._dispatch.builder.snapshot())
        return web.json_response({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: web.Request) -> web.Response:
        """``GET /v1/models/{name}``: one of them."""
        self._reader.caller(request)
        name = request.match_info["name"]
        check_model(self._dispatch.builder.snapshot(), name)
        return web.json_response(self._model(name))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/chat/completions``."""
        return await self._generate(request, "chat")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/completions``."""
        return await self._generate(request, "completion")

    # ---- generating ---------------------------------------------------------------------------

    async def _generate(self, request: web.Request, kind: ApiKind) -> web.StreamResponse:
        caller = self._reader.caller(request)
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
            prepared = await self._reader.prepare(request, kind, caller)
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
        sender = Sender(answer, sink, record, exchange, is_known=read is not None)
        return await send_stream(
            request, self.resumer, sender, plan, replay=None if read is None else ()
        )

    async def _resume(
        self, request: web.Request, kind: ApiKind, caller: Caller, header: str
    ) -> web.StreamResponse:
        """The rest of an answer. Of the body only counts how it wants to be answered, unless nobody
        knows the answer, or only one that proves to be another: then it is computed again."""
        parsed = await self._reader.parse(request, kind)
        if not parsed.stream:
            raise RequestError(
                f"only streamed answers can be resumed; send stream: true, or no {HEADER}",
                code="invalid_value",
                param=HEADER,
            )
        event = parse_event_id(header, kind)
        try:
            answer = await self.resumer.find(caller.tenant, event)
            return await self._go_on(request, kind, caller, parsed, event, answer)
        except RequestError as exc:
            if not can_be_computed(exc, event):
                raise
        try:
            return await self._compute(request, kind, caller, event)
        except RequestError as exc:
            if exc.code == "stream_unknown":
                self._dispatch.metrics.resumed.add("unknown")
            raise

    async def _go_on(
        self,
        request: web.Request,
        kind: ApiKind,
        caller: Caller,
        parsed: ParsedRequest,
        event: EventId,
        answer: Resumable,
    ) -> web.StreamResponse:
        """The rest of an answer that is known, or is being computed again."""
        pin = pin_of(request, caller)
        request_id, model = answer.key[1], answer.spec.model
        renderer = StreamRenderer(kind, request_id, model, answer.created_s, parsed.include_usage)
        sink = SseSink(renderer, answer, _cutter(request), event.proof)
        hears: AnswerSink = sink
        replay: list[bytes] = []
        if event.proof is not None and answer.is_behind(event):
            hears = UnheardSink(sink, answer, event.proof, self._dispatch.metrics.resumed)
        else:
            replay = [sink.replayed(escaped, upto) for escaped, upto in answer.after(event)]
        place = self._reader.place(request)
        exchange = None
        if answer.ended is not None:
            record = RequestRecord(request_id, model, caller.tenant, place.source)
            sink.headers(answer.served.prefill, answer.served.decode)
            sink.finish(answer.ended.reason, answer.ended.usage)
        else:
            spec = answer.next_spec(self._reader.deadline())
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
            exchange = Exchange(self._dispatch, spec, record, routing, prompt_bytes, hears)
        sender = Sender(answer, sink, record, exchange, is_known=True)
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


def _cutter(request: web.Request) -> Callable[[], None]:
    """Cuts the connection of a client that does not read."""

    def cut() -> None:
        if request.transport is not None:
            request.transport.abort()

    return cut
