"""A fake node's end of one router's link: legs that hand over in memory, faults it was told."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from tests.fakes.fake_answer import escape, next_token, prompt_tokens, token_text
from wire.framing import FrameWriter, encode, node_side_reader
from wire.messages import (
    Accepted,
    Attach,
    Attached,
    Cancel,
    Detached,
    Drill,
    DrillStarted,
    Failed,
    Finished,
    Goodbye,
    Hello,
    Loading,
    NodeMessage,
    Ping,
    Pong,
    Refused,
    Retarget,
    RouterMessage,
    Step,
    StepEntry,
    Submit,
    TransferReport,
    Warm,
)
from wire.prefix import canonical_bytes

if TYPE_CHECKING:
    from tests.fakes.fake_node import FakeNode


class HandOver:
    """One transfer: the prefill leg commits ids, the decode leg takes them, or either breaks it."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.committed: asyncio.Future[list[int]] = loop.create_future()
        self.taken: asyncio.Future[bool] = loop.create_future()  # False: it broke

    def commit(self, ids: list[int]) -> None:
        """The prefill leg is done; no ids: its answer ended before the hand-over."""
        if not self.committed.done():
            self.committed.set_result(ids)

    def end(self, taken: bool) -> None:
        """The decode leg has everything, or will never have it."""
        if not self.taken.done():
            self.taken.set_result(taken)


class FakeMesh:
    """Where fake prefill legs meet fake decode legs, by transfer id."""

    def __init__(self) -> None:
        self._transfers: dict[bytes, HandOver] = {}

    def transfer(self, number: bytes) -> HandOver:
        """The transfer, known to whichever side comes first."""
        return self._transfers.setdefault(number, HandOver())


@dataclass(slots=True)
class Faults:
    """What goes wrong. ``leg`` limits it to one kind of leg (None: all).

    ``refuse`` (code, retryable) answers a Submit; ``fail_after`` / ``drop_after`` give up the
    stream or the whole connection once that many tokens were sent by the leg; ``in_flight`` does so
    in a decode leg that still waits for its hand-over ("detach" breaks only the hand-over).
    ``times`` limits how often.
    """

    leg: str | None = None
    refuse: tuple[str, bool] | None = None
    fail_after: int | None = None
    drop_after: int | None = None
    in_flight: Literal["fail", "drop", "detach"] | None = None
    times: int = 1_000_000


@dataclass(slots=True)
class Spoken:
    """What a fake node remembers of an answer, for ever: its newest leg and all tokens so far."""

    submit: Submit
    ids: list[int]
    reason: str = ""


class FakeConnection(asyncio.Protocol):
    """One router's connection."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.legs: dict[int, asyncio.Task[None]] = {}
        self._reader = node_side_reader()
        self._writer = FrameWriter()
        self._transport: asyncio.Transport | None = None
        self._incoming: set[int] = set()  # decode legs that wait for their hand-over
        self._outgoing: dict[int, asyncio.Future[Retarget]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.node.connections.append(self)
        self._transport.write(encode(self.node.hello()))
        self.say(self.node.load_message())

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._receive(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self in self.node.connections:
            self.node.connections.remove(self)
        for leg in self.legs.values():
            leg.cancel()
        asyncio.ensure_future(self.node.note())  # noqa: RUF006

    def drop(self) -> None:
        """Break the connection."""
        if self._transport is not None:
            self._transport.abort()

    def say(self, message: NodeMessage) -> None:
        if self._transport is None:
            return
        frame = self._writer.push(message)
        while frame:
            self._transport.write(frame)
            frame = self._writer.next_bulk()

    def _receive(self, message: RouterMessage) -> None:
        match message:
            case Ping(nonce):
                loop = asyncio.get_running_loop()
                loop.call_later(self.node.rtt_s, self.say, Pong(nonce))
            case Submit():
                self.node.submits.append(message)
                if message.leg == "prefill":
                    self._outgoing[message.stream] = asyncio.Future()
                leg = asyncio.ensure_future(self._run(message))
                self.legs[message.stream] = leg
                leg.add_done_callback(lambda _: self._forget(message.stream))
            case Cancel(stream):
                self.node.cancels.append(stream)
                running = self.legs.get(stream)
                if running is not None:
                    running.cancel()
                    kept = self.node.kept if stream in self._incoming else 0
                    self.say(Finished(stream, "cancelled", 0, 0.0, 0.0, None, kept))
            case Retarget(stream):
                assert self.node.max_version >= 2, "a word of version 2 on a link of version 1"
                self.node.retargets.append(message)
                waiting = self._outgoing.get(stream)
                if waiting is not None:
                    if waiting.done():  # and not looked at yet
                        waiting = self._outgoing[stream] = asyncio.Future()
                    waiting.set_result(message)
            case Warm():
                assert self.node.max_version >= 3, "a word of version 3 on an older link"
                self.node.warms.append(message)
                self.node.wanted()
            case Drill():
                self.node.drills.append(message)
                self.say(DrillStarted(message.number, self.node.drill_error))
                if self.node.cold_start is not None and not self.node.drill_error:
                    self.node.cold_start(message)
            case Attach():
                self.node.attaches.append(message)
                self.say(self._attached(message))
            case Hello() | Goodbye():
                pass
            case _:
                raise AssertionError(f"a router said {message}")
        if not isinstance(message, Ping):
            asyncio.ensure_future(self.node.note())  # noqa: RUF006

    def _attached(self, question: Attach) -> Attached | Refused:
        """Stop the answer's legs here, and tell all of it."""
        key = question.tenant, question.request_id
        spoken = self.node.answers.get(key)
        if spoken is None or len(spoken.ids) < question.from_index:
            return Refused(question.stream, "stream_unknown", "not known here", False, 0)
        stream = spoken.submit.stream
        for connection in self.node.connections:
            leg = connection.legs.get(stream)
            if leg is not None and not spoken.reason:
                leg.cancel()
                connection.say(Failed(stream, "taken_over", "another connection goes on", False))
        text = "".join(map(token_text, spoken.ids[question.from_index :]))
        prompt = prompt_tokens(spoken.submit.input)
        return Attached(
            question.stream, spoken.submit, spoken.ids, escape(text), prompt, 0, spoken.reason
        )

    def _forget(self, stream: int) -> None:
        self.legs.pop(stream, None)
        self._incoming.discard(stream)
        self._outgoing.pop(stream, None)
        asyncio.ensure_future(self.node.note())  # noqa: RUF006

    # ---- one leg ------------------------------------------------------------------------------

    async def _run(self, submit: Submit) -> None:
        await self.node.note()
        node, faults = self.node, self._faults(submit)
        if faults is not None and faults.refuse is not None:
            code, retryable = faults.refuse
            if submit.leg == "decode" and submit.transfer is not None:
                node.mesh.transfer(submit.transfer.id).end(taken=False)
            self.say(Refused(submit.stream, code, f"told to refuse: {code}", retryable, 0))
            return
        if prompt_tokens(submit.input) > node.context_tokens:
            text = f"the prompt exceeds {node.context_tokens} tokens"
            self.say(Refused(submit.stream, "context_length_exceeded", text, False, 0))
            return
        if node.warmth not in ("", "warm"):
            node.wanted()
            self.say(Loading(submit.stream, node.eta_ms))
            node.waiting.append(submit.stream)
            await node.note()
            await node.in_memory.wait()
        self.say(Accepted(submit.stream, prompt_tokens(submit.input), 0))
        ids = list(submit.forced_ids)
        if submit.leg == "decode":
            handed = await self._take_over(submit, faults)
            if handed is None:
                return
            assert handed[: len(ids)] == ids, "the hand-over does not continue the forced ids"
            ids = list(handed)
        await self._generate(submit, ids, faults)

    async def _take_over(self, submit: Submit, faults: Faults | None) -> list[int] | None:
        """The ids that the prefill leg hands over; None: there is nothing to decode here."""
        assert submit.transfer is not None
        stream, hand_over = submit.stream, self.node.mesh.transfer(submit.transfer.id)
        self._incoming.add(stream)
        try:
            if faults is not None and faults.in_flight is not None:
                await self.node.go.wait()
                hand_over.end(taken=False)
                if faults.in_flight == "drop":
                    self.drop()
                elif faults.in_flight == "fail":
                    text = "told to fail"
                    self.say(Failed(stream, "engine_died", text, True, self.node.kept))
                else:
                    await asyncio.Event().wait()  # until cancelled
                return None
            handed = await hand_over.committed
            hand_over.end(taken=True)
        finally:
            hand_over.end(taken=False)
        self._incoming.discard(stream)
        if not handed:  # the answer ended before the hand-over
            self.say(Failed(stream, "answer_complete", "complete", False))
            return None
        return handed

    async def _hand_over(self, submit: Submit, ids: list[int]) -> None:
        """Commit to the decode node; to another one when that breaks and the router names it."""
        assert submit.transfer is not None
        node, stream, attempt = self.node, submit.stream, submit.attempt
        number = submit.transfer.id
        while True:
            told = self._outgoing[stream]
            hand_over = node.mesh.transfer(number)
            hand_over.commit(list(ids))
            await asyncio.wait((hand_over.taken, told), return_when=asyncio.FIRST_COMPLETED)
            if hand_over.taken.done() and hand_over.taken.result():
                report = TransferReport(1000, 1000, 900, 10.0, 11.0, 1.0, 0.1)
                self.say(Finished(stream, "handoff", len(ids), 1.0, 10.0, report))
                return
            if not told.done():
                if node.max_version < 2:
                    self.say(Failed(stream, "transfer_failed", "it broke", True))
                    return
                self.say(Detached(stream, attempt, "transfer_failed", "it broke"))
                await told
            if self._outgoing[stream] is told:
                self._outgoing[stream] = asyncio.Future()
            attempt, number = told.result().attempt, told.result().transfer.id

    async def _generate(self, submit: Submit, ids: list[int], faults: Faults | None) -> None:
        node, stream = self.node, submit.stream
        data = canonical_bytes(submit.input)
        limit = min(submit.sampling.max_tokens or node.answer_tokens, node.answer_tokens)
        spoken = Spoken(submit, ids)
        node.answers[submit.tenant, submit.request_id] = spoken
        sent = 0
        while len(ids) < limit:
            await node.go.wait()
            if faults is not None and sent == faults.fail_after:
                self.say(Failed(stream, "engine_died", "told to fail", True))
                return
            if faults is not None and sent == faults.drop_after:
                self.drop()
                return
            token = next_token(data, ids)
            self.say(
                Step(
                    [
                        StepEntry(
                            stream,
                            len(ids),
                            [token],
                            escape(token_text(token) + "x" * node.padding),
                        )
                    ]
                )
            )
            ids.append(token)
            sent += 1
            if submit.leg == "prefill" and len(ids) < limit:
                await self._hand_over(submit, ids)
                return
            await asyncio.sleep(0)
        if submit.leg == "prefill":
            assert submit.transfer is not None
            node.mesh.transfer(submit.transfer.id).commit([])
        complete = submit.sampling.max_tokens == limit
        spoken.reason = "length" if complete else "stop"
        self.say(Finished(stream, "length" if complete else "stop", len(ids), 1.0, 10.0, None))

    def _faults(self, submit: Submit) -> Faults | None:
        faults = self.node.faults
        if faults.times <= 0 or faults.leg not in (None, submit.leg):
            return None
        faults.times -= 1
        return faults
