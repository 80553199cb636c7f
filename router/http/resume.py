"""Finds the answers that clients ask for again: here, or at the nodes that another router used.

The shell around ``router.request.resume_book``. It knows who sends an answer now, so that a new
connection can take over from one that only seems alive.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from router.api.event_id import HEADER, EventId, TextProof
from router.api.render import ClientFinish, Usage
from router.dispatch import Dispatch
from router.http.sinks import SseSink
from router.links.node_link import NodeLink
from router.request.events import RequestSpec
from router.request.exchange import Exchange
from router.request.record import RequestRecord
from router.request.resume_book import KEEP_S, Ended, Key, Resumable, ResumeBook, Served
from wire.errors import MeshError, OverloadError, RequestError
from wire.messages import Accepted, Attach, Attached
from wire.prefix import canonical_bytes

MAX_SEARCHES = 64
"""Searches among the nodes at once; each asks all of them, with a frame of a hundred bytes. Guess:
a router that dies with hundreds of streams leaves its neighbours some round trips of questions."""

SEARCH_WAIT_S = 5.0
"""How long a client that comes back waits for its search to begin. Guess: all clients of a router
that died come at once, and a node that says nothing holds up each search as long as it may."""

TRIM_PERIOD_S = 1.0
"""How often records are checked against their bounds: an answer grows by a few hundred bytes
meanwhile."""


@dataclass(frozen=True, slots=True)
class Sender:
    """One connection that an answer is sent over; ``exchange`` None: it was complete before.

    ``is_known``: the client has read events of it, and may come back whether it reads more or not.
    """

    answer: Resumable
    sink: SseSink
    record: RequestRecord
    exchange: Exchange | None
    is_known: bool = False

    def note(self) -> None:
        """Note down how far the answer has come."""
        if self.exchange is not None:
            self.answer.rest(self.exchange.relayed, self.exchange.accepted)


class Resumer:
    """The resumable answers of one router."""

    def __init__(self, dispatch: Dispatch) -> None:
        self.book = ResumeBook()
        self._dispatch = dispatch
        self._loop = asyncio.get_running_loop()
        self._senders: dict[Key, Sender] = {}
        self._searches = asyncio.Semaphore(MAX_SEARCHES)
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """The router ends."""
        if self._timer is not None:
            self._timer.cancel()

    # ---- connections --------------------------------------------------------------------------

    def hold(self, sender: Sender) -> None:
        """An answer is being sent from now on, over this connection alone."""
        self.hang_up(sender.answer.key)
        self._senders[sender.answer.key] = sender
        self._keep(sender.answer)

    def let_go(self, sender: Sender) -> None:
        """Its connection has ended; nothing happens when another has taken over."""
        key = sender.answer.key
        if self._senders.get(key) is not sender:
            return
        del self._senders[key]
        sender.note()
        answer = sender.answer
        is_known = sender.is_known or answer.served.prefill != ""
        if is_known and not answer.is_dropped and sender.record.outcome != "taken_over":
            self.book.released(answer, self._loop.time())
        else:  # it never had an event, is another text, or its nodes gave it to another router
            self.book.forget(key)

    def _keep(self, answer: Resumable) -> None:
        self.book.sending(answer)
        if self._timer is None:
            self._timer = self._loop.call_later(TRIM_PERIOD_S, self._trim)

    def _trim(self) -> None:
        self.book.trim(self._loop.time())
        again = len(self.book) > 0
        self._timer = self._loop.call_later(TRIM_PERIOD_S, self._trim) if again else None

    # ---- finding ------------------------------------------------------------------------------

    async def find(self, tenant: str, event: EventId) -> Resumable:
        """The answer, at rest, with a ``position`` for the event, or else behind it.

        Whoever sent it, here or elsewhere, sends it no more. Raises ``RequestError``
        (``stream_unknown``, whatever the reason, not yet counted if it can be computed again;
        ``invalid_value`` for an id without proof that no event of a known answer had) or
        ``OverloadError``.
        """
        key = tenant, event.request_id
        found = self._sent_here(key, event)
        if found is None:
            told = await self._elsewhere(key, event)
            # Another connection may have been quicker.
            found = self._sent_here(key, event) or self._told(event, told)
        answer, where = found or (self._behind(key, event, told), None)
        self._take_over(answer)
        if where is not None:
            self._dispatch.metrics.resumed.add(where)
            answer.finish_if_full()
        return answer

    def _sent_here(self, key: Key, event: EventId) -> tuple[Resumable, str] | None:
        """What came as far as the event at this router, and how that is counted."""
        answer = self._here(key)
        if answer is None or answer.position(event) is None:
            return None
        return answer, "here"

    @staticmethod
    def _told(event: EventId, told: Resumable | None) -> tuple[Resumable, str] | None:
        """What came as far at a node."""
        if told is None or told.position(event) is None:
            return None
        return told, "elsewhere"

    def _behind(self, key: Key, event: EventId, told: Resumable | None) -> Resumable:
        """What comes nearest to the event. Raises ``RequestError``."""
        here = self._here(key)
        behind = [one for one in (here, told) if one is not None and one.is_behind(event)]
        if behind:
            return max(behind, key=lambda answer: answer.num_tokens)
        if event.proof is not None:
            raise _unknown()  # it may be computed again, see router.http.again
        self._dispatch.metrics.resumed.add("unknown")
        raise _unknown() if here is None else _never_sent(event)

    def _here(self, key: Key) -> Resumable | None:
        sender = self._senders.get(key)
        if sender is not None:
            sender.note()
        return self.book.get(key, self._loop.time())

    def _take_over(self, answer: Resumable) -> None:
        """End the connection that sends it, if there is one; keep it for the next."""
        self.hang_up(answer.key)
        self._keep(answer)
        self.book.released(answer, self._loop.time())

    def hang_up(self, key: Key) -> None:
        """End the connection that sends an answer, if there is one."""
        sender = self._senders.pop(key, None)
        if sender is not None:
            if sender.exchange is not None:
                sender.exchange.client_gone("taken_over")
            sender.sink.taken_over()

    # ---- asking nodes -------------------------------------------------------------------------

    async def _elsewhere(self, key: Key, event: EventId) -> Resumable | None:
        """The fullest answer that any node knows, from the event on."""
        try:
            async with asyncio.timeout(SEARCH_WAIT_S):
                await self._searches.acquire()
        except TimeoutError as exc:
            text = "many answers are being looked for"
            raise OverloadError(text, retry_after_s=1.0) from exc
        try:
            async with asyncio.TaskGroup() as group:
                links = [link for link in self._dispatch.pool.all() if link.version >= 2]
                asked = {
                    link.node.name: group.create_task(self._ask(link, key, event)) for link in links
                }
        finally:
            self._searches.release()
        told = {node: task.result() for node, task in asked.items()}
        return fullest(key, event, {node: one for node, one in told.items() if one is not None})

    async def _ask(self, link: NodeLink, key: Key, event: EventId) -> Attached | None:
        tenant, request_id = key
        number = self._dispatch.next_stream()
        question = Attach(number, request_id, tenant, first_asked(event))
        try:
            answer = await link.ask(number, question)
        except MeshError:
            return None
        return answer if isinstance(answer, Attached) else None


def first_asked(event: EventId) -> int:
    """The token from which on a node is asked for the text: all of it where there is a proof."""
    return event.upto if event.proof is None else 0


def fullest(key: Key, event: EventId, told: dict[str, Attached]) -> Resumable | None:
    """The fullest of what nodes told that goes on after the event, or may do so: it is behind."""
    known = [
        (node, answer)
        for node, answer in told.items()
        if (answer.submit.tenant, answer.submit.request_id) == key and _may_go_on(answer, event)
    ]
    if not known:
        return None
    node, best = max(known, key=lambda item: (len(item[1].ids), item[1].reason != ""))
    # What of the prompt was cached is the prefill node's to say.
    prompts = [answer for _, answer in known if answer.submit.leg != "decode"]
    return _resumable(key, event, node, best, prompts[0] if prompts else best)


def _may_go_on(told: Attached, event: EventId) -> bool:
    """Whether this can be the answer that the event is of."""
    if event.proof is None:
        return len(told.ids) >= event.upto
    if len(told.text) < event.proof.num_bytes:
        return not told.reason and len(told.ids) < event.upto
    return event.proof.end_in(told.text, TextProof()) is not None


def _resumable(key: Key, event: EventId, node: str, told: Attached, prompt: Attached) -> Resumable:
    """What a node told, as if it had been sent from here: from ``first_asked`` on."""
    tenant, request_id = key
    submit = told.submit
    spec = RequestSpec(
        request_id=request_id,
        model=submit.model,
        tenant=tenant,
        input=submit.input,
        sampling=submit.sampling,
        chain=submit.chain,
        deadline=0.0,  # of its own at every start
    )
    prompt_bytes = len(canonical_bytes(submit.input))
    begin = None if event.proof is None else TextProof()
    answer = Resumable(spec, int(time.time()), prompt_bytes, first_asked(event), begin)
    peer = node if submit.transfer is None else submit.transfer.peer
    answer.served = Served(peer, node) if submit.leg == "decode" else Served(node, peer)
    cached = min(prompt.cached_tokens, prompt.prompt_tokens)
    answer.rest(told.ids, Accepted(told.stream, prompt.prompt_tokens, cached))
    if told.text:
        answer.add(told.text, len(told.ids))
    if told.reason:
        reason: ClientFinish = "length" if told.reason == "length" else "stop"
        answer.ended = Ended(reason, Usage(prompt.prompt_tokens, cached, len(told.ids)))
    return answer


def _unknown() -> RequestError:
    return RequestError(
        f"no such answer is known: it may be older than {KEEP_S:.0f} s, or another tenant's; send "
        f"the request again without {HEADER}",
        code="stream_unknown",
        param=HEADER,
    )


def _never_sent(event: EventId) -> RequestError:
    return RequestError(
        f"no event of {event.request_id} had the index {event.upto}; send the id of the last event "
        "received",
        code="invalid_value",
        param=HEADER,
    )
