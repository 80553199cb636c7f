"""How a simulated router serves clients; stands in for ``router.http``'s.

``router.request.exchange``, ``router.http.resume`` and ``again`` are the real ones: only the
questions to nodes, which the second awaits, are asked over simulated links.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from router.api.event_id import EventId
from router.http.again import UnheardSink, can_be_computed
from router.http.resume import Resumer, Sender, first_asked, fullest
from router.request.events import RequestSpec
from router.request.exchange import Exchange
from router.request.record import RequestRecord
from router.request.resume_book import Ended, Key, Resumable, Served
from router.routing.policy import Pin, RouteRequest
from tests.sim.clock import Process
from tests.sim.links import End
from tests.sim.node_shell import MODEL
from topology.model import Topology
from wire.errors import MeshError, RequestError
from wire.messages import Attach, Attached, Sampling, TokensInput
from wire.prefix import canonical_bytes


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client sends: a whole request."""

    request_id: str
    tenant: str
    prompt: tuple[int, ...]
    sampling: Sampling
    timeout_s: float
    pin: Pin


@dataclass(frozen=True, slots=True)
class ComeBack:
    """What a client sends that lost its connection after an event: its request again, and which
    event that was."""

    ask: Ask
    event: EventId


@dataclass(frozen=True, slots=True)
class Said:
    """One event of an answer: text, a finish (``reason``) or an error (``code``)."""

    text: bytes = b""
    upto: int = 0
    reason: str = ""
    completion_tokens: int = 0
    code: str = ""
    retryable: bool = False


class _Answers:
    """What ``SimResumer`` awaits: as many answers as questions were asked."""

    def __init__(self) -> None:
        self.told: dict[str, Attached] = {}
        self.left = 0
        self.go_on: Any = None

    def hear(self, node: str, answer: Any) -> None:
        if isinstance(answer, Attached):
            self.told[node] = answer
        self.left -= 1
        if not self.left and self.go_on is not None:
            self.go_on()

    def __await__(self) -> Generator[_Answers, None, dict[str, Attached]]:
        if self.left:
            yield self
        return self.told


class SimResumer(Resumer):
    """The real resumer; asks nodes over simulated links."""

    async def _elsewhere(self, key: Key, event: EventId) -> Resumable | None:
        dispatch, answers = self._dispatch, _Answers()
        links: list[Any] = [link for link in dispatch.pool.all() if link.version >= 2]
        for link in links:
            number = dispatch.next_stream()
            answers.left += 1
            question = Attach(number, key[1], key[0], first_asked(event))
            link.ask(number, question, answers.hear)
        return fullest(key, event, await answers)


class RouterOfClients(Protocol):
    """What serving a client needs of its router."""

    process: Process
    topology: Topology
    site: str
    dispatch: Any
    resumer: SimResumer
    records: list[RequestRecord]
    violations: list[str]


class ClientEnd:
    """The router's end of a client's connection: one request, and the sink of its answer."""

    def __init__(self, router: RouterOfClients, end: End) -> None:
        self._router = router
        self._end = end
        self._ends = 0
        self._sender: Sender | None = None
        self._replay: list[tuple[bytes, int]] = []
        self._lost = False
        end.handler = self

    def on_message(self, message: Ask | ComeBack) -> None:
        if isinstance(message, Ask):
            self._begin(message)
        else:
            self._search(self._router.resumer.find(message.ask.tenant, message.event), message)

    def on_lost(self) -> None:
        self._lost = True
        self._let_go()

    # ---- beginning -----------------------------------------------------------------------------

    def _exchange(
        self, spec: RequestSpec, answer: Resumable, read: EventId | None
    ) -> tuple[Exchange, RequestRecord]:
        """``read``: the text before this event is to be kept from the client, who has read it."""
        router, sink = self._router, self._as_sink()
        if read is not None and read.proof is not None and answer.is_behind(read):
            sink = UnheardSink(sink, answer, read.proof, router.dispatch.metrics.resumed)
        record = RequestRecord(spec.request_id, MODEL, spec.tenant, "sim")
        router.records.append(record)
        prompt_bytes = len(canonical_bytes(spec.input))
        args = (router.dispatch, spec, record, self._routing, prompt_bytes, sink)
        return Exchange(*args), record

    def _measured(self, spec: RequestSpec) -> RequestSpec:
        router = self._router
        max_tokens = spec.sampling.max_tokens
        work, chain, _ = router.dispatch.measure(MODEL, spec.tenant, spec.input, max_tokens)
        self._routing = RouteRequest(work, router.topology.sites[router.site].position)
        return replace(spec, chain=chain)

    def _begin(self, ask: Ask, read: EventId | None = None) -> None:
        """``ModelApi._stream``; ``read``: as its client has read its beginning."""
        router = self._router
        prompt = TokensInput(list(ask.prompt))
        deadline = router.process.time() + ask.timeout_s
        spec = self._measured(
            RequestSpec(ask.request_id, MODEL, ask.tenant, prompt, ask.sampling, [], deadline)
        )
        try:
            plan = router.dispatch.choose(replace(self._routing, pin=ask.pin))
        except MeshError as error:
            self.error(error)
            return
        answer = Resumable(spec, 0, len(canonical_bytes(prompt)))
        exchange, record = self._exchange(spec, answer, read)
        router.dispatch.retry_budget.deposit()
        self._hold(Sender(answer, self._as_sink(), record, exchange, is_known=read is not None))
        exchange.start(plan)

    def _search(self, find: Coroutine[Any, Any, Resumable], message: ComeBack) -> None:
        """Drive the coroutine from answer to answer."""
        try:
            waiting: _Answers = find.send(None)
        except StopIteration as done:
            self._resume(done.value, message)
        except RequestError as error:
            if not can_be_computed(error, message.event):
                self.error(error)
            elif not self._lost:
                self._begin(message.ask, message.event)
        except MeshError as error:
            self.error(error)
        else:
            waiting.go_on = lambda: self._search(find, message)

    def _resume(self, answer: Resumable, message: ComeBack) -> None:
        """``ModelApi._go_on``."""
        if self._lost:
            return
        ask, event = message.ask, message.event
        if answer.ended is not None:
            self._replay = list(answer.after(event))
            record = RequestRecord(ask.request_id, MODEL, ask.tenant, "sim")
            self._hold(Sender(answer, self._as_sink(), record, None, is_known=True))
            self._tell_replay()
            self.finish(answer.ended.reason, answer.ended.usage)
            return
        if not answer.is_behind(event):
            self._replay = list(answer.after(event))
        spec = self._measured(answer.next_spec(self._router.process.time() + ask.timeout_s))
        exchange, record = self._exchange(spec, answer, event)
        self._hold(Sender(answer, self._as_sink(), record, exchange, is_known=True))
        exchange.resume()

    def _as_sink(self) -> Any:
        return self

    def _hold(self, sender: Sender) -> None:
        self._sender = sender
        self._router.resumer.hold(sender)

    def _let_go(self) -> None:
        sender, self._sender = self._sender, None
        if sender is None:
            return
        if sender.exchange is not None:
            sender.exchange.client_gone()
        self._router.resumer.let_go(sender)

    # ---- the sink ------------------------------------------------------------------------------

    def headers(self, prefill: str, decode: str) -> None:
        if self._sender is not None:
            self._sender.answer.served = Served(prefill, decode)
        self._tell_replay()

    def _tell_replay(self) -> None:
        replay, self._replay = self._replay, []
        for escaped, upto in replay:
            self._end.send(Said(text=escaped, upto=upto))

    def text(self, escaped: bytes, upto: int) -> None:
        if self._sender is not None:
            self._sender.answer.add(escaped, upto)
        self._end.send(Said(text=escaped, upto=upto))

    def finish(self, reason: Any, usage: Any) -> None:
        if self._sender is not None:
            self._sender.answer.ended = Ended(reason, usage)
        self._over(Said(reason=reason, completion_tokens=usage.completion_tokens))

    def error(self, error: MeshError) -> None:
        self._over(Said(code=error.code, retryable=error.retryable))

    def taken_over(self) -> None:
        """Another connection goes on with this answer."""
        if not self._ends:
            self._over(Said(code="taken_over"))

    def _over(self, said: Said) -> None:
        self._ends += 1
        if self._ends > 1:
            self._router.violations.append(f"an answer ended {self._ends} times: {said}")
        self._end.send(said)
        self._end.close()
        # The task that serves the client goes on in a turn of the loop of its own.
        self._router.process.call_later(0.0, self._let_go)
