"""A fake node: speaks the mesh wire, computes nothing, and says so in every token.

The next token is a pure function of the prompt and the ids before it, so a token that is lost,
repeated or out of order shows in the text. Prefill and decode legs hand over through a ``FakeMesh``
in memory instead of a KV stream; a prefill leg whose hand-over breaks detaches and takes another
decode node, as real ones do. Faults are set on the node before or while requests run.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, cast

import msgspec

from wire.address import format_address
from wire.framing import FrameWriter, encode, node_side_reader
from wire.messages import (
    MAX_VERSION,
    MIN_VERSION,
    Accepted,
    Attach,
    Attached,
    CacheDelta,
    Cancel,
    Detached,
    Drill,
    DrillStarted,
    EngineLoad,
    Failed,
    Finished,
    Goodbye,
    Hello,
    Input,
    Load,
    Loading,
    ModelOffer,
    NodeMessage,
    Ping,
    Pong,
    Refused,
    Retarget,
    Role,
    RouterMessage,
    Step,
    StepEntry,
    Submit,
    TransferReport,
    Warm,
    Warmth,
)
from wire.prefix import canonical_bytes

VOCABULARY = 1000


def next_token(prompt: bytes, ids: list[int]) -> int:
    """The one token that follows ``ids`` after ``prompt``."""
    state = hashlib.blake2b(prompt + repr(ids).encode(), digest_size=8).digest()
    return int.from_bytes(state, "little") % VOCABULARY


def token_text(token: int) -> str:
    """Printable form; holds characters that JSON must escape."""
    return f'fake"{token}é\n'


def answer_ids(prompt: Input, count: int) -> list[int]:
    """The first ``count`` tokens of the only right answer."""
    data, ids = canonical_bytes(prompt), list[int]()
    for _ in range(count):
        ids.append(next_token(data, ids))
    return ids


def answer_text(prompt: Input, count: int) -> str:
    """Their text."""
    return "".join(map(token_text, answer_ids(prompt, count)))


def prompt_tokens(prompt: Input) -> int:
    """How many tokens the fake says a prompt has."""
    return max(1, len(canonical_bytes(prompt)) // 4)


def escape(text: str) -> bytes:
    """JSON-escape without the quotes, as nodes do."""
    return msgspec.json.encode(text)[1:-1]


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


@dataclass(slots=True)
class FakeNode:
    """One fake node. ``go`` gates every token; ``submits``, ``cancels``, ``retargets``, ``drills``
    and ``attaches`` are what routers said; ``drill_error`` is what it answers to a drill;
    ``cold_start`` is called then.

    ``rtt_s`` is how long a ping takes, as if the node were that far away; ``padding`` adds that
    many bytes to every token's text. ``max_version`` is the newest of the wire that it knows.
    ``warmth`` other than "" makes the model one that comes and goes: a leg or a ``Warm`` (kept in
    ``warms``) begins a load unless it is "warm", which ends when the test calls ``loaded``;
    ``loads`` counts them, ``waiting`` are the streams that were told to wait for one, and
    ``memory_bytes`` is its budget.
    ``kept`` tokens are what a decode leg keeps of a hand-over that did not come. ``starts`` counts
    its incarnations.
    """

    name: str
    site: str
    mesh: FakeMesh
    mesh_name: str = "test"
    model: str = "fake-model"
    roles: tuple[Role, ...] = ("prefill", "decode")
    identity: str = "00ff"
    context_tokens: int = 4096
    answer_tokens: int = 8
    faults: Faults = field(default_factory=Faults)
    rtt_s: float = 0.0
    padding: int = 0
    kept: int = 0
    starts: int = 0
    load: EngineLoad | None = None
    submits: list[Submit] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    retargets: list[Retarget] = field(default_factory=list)
    drills: list[Drill] = field(default_factory=list)
    drill_error: str = ""
    cold_start: Callable[[Drill], None] | None = None
    warmth: Warmth = ""
    eta_ms: int = 0
    memory_bytes: int = 0
    warms: list[Warm] = field(default_factory=list)
    loads: int = 0
    waiting: list[int] = field(default_factory=list)
    in_memory: asyncio.Event = field(default_factory=asyncio.Event)
    attaches: list[Attach] = field(default_factory=list)
    answers: dict[tuple[str, str], Spoken] = field(default_factory=dict)
    max_version: int = MAX_VERSION
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    connections: list[_Connection] = field(default_factory=list)
    address: str = ""
    _server: asyncio.Server | None = None

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        """A new incarnation: listen on a free loopback port, or where it listened before."""
        self.starts += 1
        self.go.set()
        loop = asyncio.get_running_loop()
        port = int(self.address.rpartition(":")[2] or 0)
        self._server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", port, ssl=tls, reuse_address=True
        )
        self.address = format_address(*self._server.sockets[0].getsockname()[:2])

    async def stop(self) -> None:
        """Close the listener and every connection."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.drop()
        await asyncio.sleep(0)

    @property
    def incarnation(self) -> str:
        """Which start this is."""
        return f"{self.name}-{self.starts}"

    def hello(self) -> Hello:
        """The greeting."""
        return Hello(
            min_version=MIN_VERSION,
            max_version=self.max_version,
            mesh=self.mesh_name,
            kind="node",
            name=self.name,
            site=self.site,
            incarnation=self.incarnation,
            roles=list(self.roles),
            models=[
                ModelOffer(
                    name=self.model,
                    identity=self.identity,
                    context_tokens=self.context_tokens,
                    kv_bytes_per_token=1000,
                    block_tokens=16,
                    total_blocks=1024,
                    dtype="float32",
                    kv_address="127.0.0.1:1",
                )
            ],
        )

    def load_message(self) -> Load:
        """An idle engine, unless ``load`` says otherwise."""
        engine = self.load or idle_engine(self.model)
        if self.warmth:
            warm = self.warmth == "warm"
            changes = {"ready": warm, "warmth": self.warmth, "eta_ms": 0 if warm else self.eta_ms}
            engine = msgspec.structs.replace(engine, **changes)
        return Load([engine], [], False, self.memory_bytes)

    def wanted(self) -> None:
        """A model that is not in memory begins to be loaded."""
        if self.warmth not in ("", "warm", "loading"):
            self.loads += 1
            self.warmth = "loading"

    def loaded(self) -> None:
        """The model is in memory: whoever waits for it begins."""
        self.warmth = "warm"
        self.in_memory.set()
        self.tell(self.load_message())

    def evicted(self) -> None:
        """The model is on the disk alone."""
        self.warmth = "disk"
        self.in_memory.clear()
        self.tell(self.load_message())

    def tell(self, message: NodeMessage) -> None:
        """Say something to every router."""
        for connection in self.connections:
            connection.say(message)

    @property
    def active(self) -> int:
        """Legs running now."""
        return sum(len(connection.legs) for connection in self.connections)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition()`` holds after some change."""
        async with self.changed, asyncio.timeout(20):
            await self.changed.wait_for(condition)

    async def note(self) -> None:
        """Wake whoever waits for a change."""
        async with self.changed:
            self.changed.notify_all()


def idle_engine(model: str, **changes: object) -> EngineLoad:
    """An engine with nothing to do."""
    values: dict[str, object] = {
        "model": model,
        "ready": True,
        "queued_prefill_tokens": 0,
        "running": 0,
        "waiting": 0,
        "free_blocks": 1024,
        "cached_blocks": 0,
        "total_blocks": 1024,
        "prefill_tokens_per_s": 1000.0,
        "decode_step_ms": 20.0,
        "transfers_in": 0,
        "transfers_out": 0,
        "streams": 0,
    }
    return EngineLoad(**(values | changes))  # type: ignore[arg-type]


class _Connection(asyncio.Protocol):
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


def cache_delta(model: str, chain: list[bytes], tokens_per_span: int) -> CacheDelta:
    """A digest that says "I hold all of this chain"."""
    added = [(value, (i + 1) * tokens_per_span) for i, value in enumerate(chain)]
    return CacheDelta(model, False, added, [])
