"""Carries out one request: feeds its machine, performs the effects, arms the one timer.

A shell: decisions are the machine's and the policy's. Calls come straight from link callbacks on
the event loop, so a token is relayed without waking a task.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import Protocol, assert_never

from router.api.render import ClientFinish, Usage
from router.dispatch import Dispatch
from router.policy import Plan, Route, RouteRequest
from router.record import RequestRecord
from router.request_events import (
    ClientGone,
    CloseStream,
    Done,
    Effect,
    EmitError,
    EmitFinish,
    EmitHeaders,
    EmitText,
    Event,
    LinkLost,
    NodeSaid,
    Replan,
    RequestSpec,
    Routed,
    SendCancel,
    SendSubmit,
    Tick,
    Tokens,
    Unroutable,
)
from router.request_machine import RequestMachine
from router.view_builder import Reservation
from wire.errors import MeshError, OverloadError
from wire.messages import Accepted, Cancel, Failed, Finished, Refused, StepEntry, Submit


class AnswerSink(Protocol):
    """Where an answer goes. Calls are synchronous and in order; ``finish`` or ``error`` is the
    last."""

    def headers(self, prefill: str, decode: str) -> None:
        """The answer begins, served by these nodes."""

    def text(self, escaped: bytes, upto: int) -> None:
        """JSON-escaped text of the output tokens before index ``upto``."""

    def finish(self, reason: ClientFinish, usage: Usage) -> None:
        """The answer is complete."""

    def error(self, error: MeshError) -> None:
        """The answer failed, before or after its beginning."""


class Exchange:
    """One request between its client and the nodes. Hears its streams as a ``StreamListener``."""

    def __init__(
        self,
        dispatch: Dispatch,
        spec: RequestSpec,
        record: RequestRecord,
        routing: RouteRequest,
        prompt_bytes: int,
        sink: AnswerSink,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._dispatch = dispatch
        self._routing = routing
        self._prompt_bytes = prompt_bytes
        self._sink = sink
        self._model = spec.model
        self._machine = RequestMachine(spec, record, self._loop.time())
        self._open: list[tuple[str, int]] = []
        self._effects: deque[Effect] = deque()
        self._performing = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self, plan: Plan) -> None:
        """Submit both legs of the first attempt."""
        self._dispatch.running.add(self)
        self._feed(self._routed(plan.route))

    def client_gone(self) -> None:
        """Nobody reads any more: cancel everything. Harmless after the end."""
        if self._machine.phase not in ("settling", "done"):
            self._feed(ClientGone())
            self._dispatch.finished(self._machine.record)

    def abandon(self) -> None:
        """The router stops: let go of whatever is left."""
        if self._machine.phase != "done":
            self._feed(ClientGone())

    # ---- what links say -----------------------------------------------------------------------

    def tokens(self, node: str, entry: StepEntry) -> None:
        """New tokens from a node."""
        self._feed(Tokens(node, entry))

    def said(self, node: str, message: Accepted | Refused | Finished | Failed) -> None:
        """A control message from a node."""
        if isinstance(message, Accepted):
            self._dispatch.ratio.learn(self._model, self._prompt_bytes, message.prompt_tokens)
        self._feed(NodeSaid(node, message))

    def link_lost(self, node: str) -> None:
        """The link to a node of this request is gone."""
        self._feed(LinkLost(node))

    # ---- effects ------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        """Handle an event and perform what follows, in order, also when performing causes
        events."""
        self._effects.extend(self._machine.handle(event, self._loop.time()))
        if self._performing:
            return
        self._performing = True
        try:
            while self._effects:
                self._perform(self._effects.popleft())
        finally:
            self._performing = False

    def _perform(self, effect: Effect) -> None:
        match effect:
            case EmitText(text, upto):
                self._sink.text(text, upto)
            case EmitHeaders(prefill, decode):
                self._dispatch.first_token(self._machine.record)
                self._sink.headers(prefill, decode)
            case SendSubmit(node, message):
                self._submit(node, message)
            case SendCancel(node, stream):
                link = self._dispatch.pool.get(node)
                if link is not None:
                    link.send(Cancel(stream))
            case CloseStream(stream):
                self._close_stream(stream)
            case Replan(avoid_nodes, avoid_pairs):
                self._feed(self._replanned(avoid_nodes, avoid_pairs))
            case EmitFinish(reason, usage):
                self._dispatch.finished(self._machine.record)
                self._sink.finish(reason, usage)
                self._arm()
            case EmitError(error):
                self._dispatch.finished(self._machine.record)
                self._sink.error(error)
            case Done():
                self._dispatch.running.discard(self)
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
            case _:
                assert_never(effect)

    def _submit(self, node: str, message: Submit) -> None:
        link = self._dispatch.pool.get(node)
        if link is None or not link.up:
            self._feed(LinkLost(node))
            return
        link.open(message.stream, self)
        self._open.append((node, message.stream))
        link.send(message)
        work = self._routing.work
        prefill_tokens = 0
        if message.leg != "decode":
            prefill_tokens = max(1, work.prompt_tokens - work.cached.get(node, 0))
        streams = 0 if message.leg == "prefill" else 1
        self._dispatch.builder.reserve(
            node,
            message.stream,
            Reservation(self._model, prefill_tokens, streams, self._loop.time()),
        )
        self._arm()

    def _close_stream(self, stream: int) -> None:
        for node, opened in self._open:
            if opened == stream:
                link = self._dispatch.pool.get(node)
                if link is not None:
                    link.close_stream(stream)
                self._dispatch.builder.release(node, stream)
        self._open = [(node, opened) for node, opened in self._open if opened != stream]

    def _replanned(
        self, avoid_nodes: frozenset[str], avoid_pairs: frozenset[tuple[str, str]]
    ) -> Routed | Unroutable:
        self._dispatch.metrics.retries.add()
        if not self._dispatch.retry_budget.withdraw():
            return Unroutable(OverloadError("too many requests are being retried already"))
        routing = replace(self._routing, avoid_nodes=avoid_nodes, avoid_pairs=avoid_pairs)
        try:
            plan = self._dispatch.choose(routing)
        except MeshError as exc:
            return Unroutable(exc)
        return self._routed(plan.route)

    def _routed(self, route: Route) -> Routed:
        return Routed(
            route,
            self._dispatch.next_stream(),
            self._dispatch.transfer_id(),
            self._dispatch.builder.snapshot().nodes[route.decode].offers[self._model].kv_address,
        )

    def _arm(self) -> None:
        """One timer, at the machine's next deadline."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._machine.next_deadline(), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._feed(Tick())
        if self._machine.phase != "done":
            self._arm()
