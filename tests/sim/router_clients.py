"""How a simulated router serves clients; stands in for ``router.http``'s.

``router.request.exchange`` and ``router.http.resume`` are the real ones: only the questions to
nodes, which the latter awaits, are asked over simulated links.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from router.api.event_id import EventId
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
from wire.errors import MeshError
from wire.messages import Attach, Attached, Sampling, TokensInput


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
    """What a client sends that lost its connection after an event."""

    request_id: str
    tenant: str
    upto: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Said:
    """One event of an answer: text, a finish (``reason``) or an error (``code``)."""

    text: bytes = b""
    upto: int = 0
    reason: str = ""
    completion_tokens: int = 0
    code: str = ""


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
            event = EventId(message.request_id, message.upto)
            self._search(self._router.resumer.find(message.tenant, event), message)

    def on_lost(self) -> None:
        self._lost = True
        self._let_go()

    # ---- beginning -----------------------------------------------------------------------------

    def _exchange(self, spec: RequestSpec, max_tokens: int | None) -> tuple[Exchange, Resumable]:
        router, sink = self._router, self
        work, chain, prompt_bytes = router.dispatch.measure(
            MODEL, spec.tenant, spec.input, max_tokens
        )
        position = router.topology.sites[router.site].position
        self._routing = RouteRequest(work, position)
        record = RequestRecord(spec.request_id, MODEL, spec.tenant, "sim")
        router.records.append(record)
        spec = replace(spec, chain=chain)
        args = (router.dispatch, spec, record, self._routing, prompt_bytes, sink)
        self._record = record
        return Exchange(*args), Resumable(spec, 0, prompt_bytes)

    def _begin(self, ask: Ask) -> None:
        """``ModelApi._stream``."""
        router = self._router
        prompt = TokensInput(list(ask.prompt))
        deadline = router.process.time() + ask.timeout_s
        spec = RequestSpec(ask.request_id, MODEL, ask.tenant, prompt, ask.sampling, [], deadline)
        exchange, answer = self._exchange(spec, ask.sampling.max_tokens)
        try:
            plan = router.dispatch.choose(replace(self._routing, pin=ask.pin))
        except MeshError as error:
            router.records.pop()
            self.error(error)
            return
        router.dispatch.retry_budget.deposit()
        self._hold(Sender(answer, self._as_sink(), self._record, exchange))
        exchange.start(plan)

    def _search(self, find: Coroutine[Any, Any, Resumable], message: ComeBack) -> None:
        """Drive the coroutine from answer to answer."""
        try:
            waiting: _Answers = find.send(None)
        except StopIteration as done:
            self._resume(done.value, message)
        except MeshError as error:
            self.error(error)
        else:
            waiting.go_on = lambda: self._search(find, message)

    def _resume(self, answer: Resumable, message: ComeBack) -> None:
        """``ModelApi._resume``."""
        if self._lost:
            return
        self._replay = list(answer.after(EventId(message.request_id, message.upto)))
        if answer.ended is not None:
            record = RequestRecord(message.request_id, MODEL, message.tenant, "sim")
            self._hold(Sender(answer, self._as_sink(), record, None))
            self._tell_replay()
            self.finish(answer.ended.reason, answer.ended.usage)
            return
        spec = answer.next_spec(self._router.process.time() + message.timeout_s)
        exchange, _ = self._exchange(spec, spec.sampling.max_tokens)
        self._hold(Sender(answer, self._as_sink(), self._record, exchange))
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
        self._over(Said(code=error.code))

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
