"""Carries out one request: feeds its machine, performs the effects, arms the one timer.

A shell: decisions are the machine's and the policy's. Calls come straight from link callbacks on
the event loop, so a token is relayed without waking a task.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import Literal, Protocol, assert_never

import msgspec

from router.api.render import ClientFinish, Usage
from router.dispatch import Dispatch
from router.links.link_words import StreamMessage
from router.request.events import (
    ClientGone,
    CloseLeg,
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
    SendRetarget,
    SendSubmit,
    SendWarm,
    Tick,
    Tokens,
    Unroutable,
)
from router.request.machine import RequestMachine
from router.request.record import RequestRecord
from router.routing.policy import Plan, Route, RouteRequest
from router.routing.recovery import Broken, Recovery, choose_recovery, salvage_patience_s
from router.routing.view_builder import Reservation
from wire.errors import MeshError, OverloadError
from wire.messages import Accepted, Cancel, StepEntry, Submit


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
        self._chain = spec.chain
        salvage_s = salvage_patience_s(routing.work, dispatch.builder.snapshot())
        spec = replace(spec, salvage_s=salvage_s)
        self._machine = RequestMachine(spec, record, self._loop.time())
        self._open: list[tuple[str, int]] = []
        self._effects: deque[Effect] = deque()
        self._performing = False
        self._timer: asyncio.TimerHandle | None = None
        self._armed_at: float | None = None

    def start(self, plan: Plan) -> None:
        """Submit both legs of the first attempt."""
        self._dispatch.running.add(self)
        self._feed(self._routed(plan.route))

    def resume(self) -> None:
        """Go on with an answer that a client has read a part of; while there is no route, wait for
        one as in the middle of any answer."""
        self._dispatch.running.add(self)
        try:
            plan = self._dispatch.choose(self._routing)
        except MeshError as exc:
            self._feed(Unroutable(exc, final=not exc.retryable))
        else:
            self._feed(self._routed(plan.route))

    @property
    def relayed(self) -> list[int]:
        """Output tokens relayed so far; not to be changed."""
        return self._machine.relayed

    @property
    def accepted(self) -> Accepted | None:
        """What the first prefill leg said of the prompt."""
        return self._machine.accepted

    def client_gone(self, outcome: Literal["client_gone", "taken_over"] = "client_gone") -> None:
        """Nobody reads any more: cancel everything. Harmless after the end."""
        if self._machine.phase not in ("settling", "done"):
            self._feed(ClientGone(outcome))
            self._dispatch.finished(self._machine.record)

    def abandon(self) -> None:
        """The router stops: let go of whatever is left."""
        if self._machine.phase != "done":
            self._feed(ClientGone())

    # ---- what links say -----------------------------------------------------------------------

    def tokens(self, node: str, entry: StepEntry) -> None:
        """New tokens from a node."""
        self._feed(Tokens(node, entry))

    def said(self, node: str, message: StreamMessage) -> None:
        """A control message from a node."""
        if isinstance(message, Accepted):
            self._dispatch.ratio.learn(self._model, self._prompt_bytes, message.prompt_tokens)
            if message.prompt_tokens > 0:  # exact from now on, for whatever is priced later
                work = replace(self._routing.work, prompt_tokens=message.prompt_tokens)
                self._routing = replace(self._routing, work=work)
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
        self._arm()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case EmitText(text, upto):
                self._sink.text(text, upto)
            case EmitHeaders(prefill, decode):
                self._dispatch.first_token(self._machine.record)
                self._sink.headers(prefill, decode)
            case SendSubmit(node, message):
                self._submit(node, message)
            case SendRetarget(node, retarget):
                link = self._dispatch.pool.get(node)
                if link is None or not link.retarget(retarget):
                    self._feed(LinkLost(node))
            case SendWarm(node, warm):
                link = self._dispatch.pool.get(node)
                if link is not None and link.warm(warm):
                    self._dispatch.builder.set_wanted(node, warm.model, self._loop.time())
            case SendCancel(node, stream):
                link = self._dispatch.pool.get(node)
                if link is not None:
                    link.send(Cancel(stream))
            case CloseLeg(node, stream):
                self._close([(node, stream)])
            case CloseStream(stream):
                self._close([leg for leg in self._open if leg[1] == stream])
            case Replan(broken):
                self._feed(self._replanned(broken))
            case EmitFinish(reason, usage):
                self._dispatch.finished(self._machine.record)
                self._sink.finish(reason, usage)
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
        transfer = message.transfer
        if message.leg == "prefill" and transfer is not None and not transfer.address:
            transfer = msgspec.structs.replace(transfer, address=self._kv_address(transfer.peer))
            message = msgspec.structs.replace(message, transfer=transfer)
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

    def _close(self, legs: list[tuple[str, int]]) -> None:
        """Hear no more of these (node, stream)."""
        for node, stream in legs:
            link = self._dispatch.pool.get(node)
            if link is not None:
                link.close_stream(stream)
            self._dispatch.builder.release(node, stream)
        self._open = [leg for leg in self._open if leg not in legs]

    def _replanned(self, broken: Broken) -> Routed | Unroutable:
        dispatch = self._dispatch
        view, now = dispatch.builder.snapshot(), self._loop.time()
        cached = dispatch.builder.prefixes.cached_tokens(self._model, self._chain)
        routing = replace(self._routing, work=replace(self._routing.work, cached=cached))
        try:
            choice = choose_recovery(routing, broken, view, now, dispatch.rng)
        except MeshError as exc:
            return Unroutable(exc)
        if not broken.relayed and not dispatch.retry_budget.withdraw(now):
            error = OverloadError("too many requests are being retried already", retry_after_s=1.0)
            return Unroutable(error, final=True)
        dispatch.metrics.retries.add()
        dispatch.metrics.recoveries.add(choice.recovery.kind)
        return self._routed(choice.route, choice.keeps_prefill, choice.recovery)

    def _routed(
        self, route: Route, keeps_prefill: bool = False, recovery: Recovery | None = None
    ) -> Routed:
        return Routed(
            route,
            self._dispatch.next_stream(),
            self._dispatch.transfer_id(),
            self._kv_address(route.decode),
            keeps_prefill,
            recovery,
        )

    def _kv_address(self, node: str) -> str:
        """Where a node takes KV of the model; empty while it does not."""
        view = self._dispatch.builder.snapshot().nodes.get(node)
        offer = None if view is None else view.offers.get(self._model)
        return "" if offer is None else offer.kv_address

    def _arm(self) -> None:
        """One timer, at the machine's next deadline."""
        at = self._machine.next_deadline()
        if at == self._armed_at or self._machine.phase == "done":
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._armed_at = self._loop.call_at(at, self._tick), at

    def _tick(self) -> None:
        self._timer = self._armed_at = None
        self._feed(Tick())
