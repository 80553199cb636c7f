"""A fake node: speaks the mesh wire, computes nothing, and says so in every token.

The next token is a pure function of the prompt and the ids before it, so a token that is lost,
repeated or out of order shows in the text. Prefill and decode legs hand over through a ``FakeMesh``
in memory instead of a KV stream. Faults are set on the node before or while requests run.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

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
    Drill,
    DrillStarted,
    EngineLoad,
    Failed,
    Finished,
    Goodbye,
    Hello,
    Input,
    Load,
    ModelOffer,
    NodeMessage,
    Ping,
    Pong,
    Refused,
    Role,
    RouterMessage,
    Step,
    StepEntry,
    Submit,
    TransferReport,
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


class FakeMesh:
    """Where fake prefill legs meet fake decode legs, by transfer id."""

    def __init__(self) -> None:
        self._commits: dict[bytes, asyncio.Future[list[int]]] = {}

    def commit(self, transfer: bytes) -> asyncio.Future[list[int]]:
        """Resolves to the ids so far once the prefill leg has handed over."""
        return self._commits.setdefault(transfer, asyncio.get_running_loop().create_future())


@dataclass(slots=True)
class Faults:
    """What goes wrong. ``leg`` limits it to one kind of leg (None: all).

    ``refuse`` (code, retryable) answers a Submit; ``fail_after`` / ``drop_after`` give up the
    stream or the whole connection once that many tokens were sent by the leg; ``times`` limits
    how often.
    """

    leg: str | None = None
    refuse: tuple[str, bool] | None = None
    fail_after: int | None = None
    drop_after: int | None = None
    times: int = 1_000_000


@dataclass(slots=True)
class Spoken:
    """What a fake node remembers of an answer, for ever: its newest leg and all tokens so far."""

    submit: Submit
    ids: list[int]
    reason: str = ""


@dataclass(slots=True)
class FakeNode:
    """One fake node. ``go`` gates every token; ``submits``, ``cancels``, ``drills`` and
    ``attaches`` are what routers said; ``drill_error`` is what it answers to a drill.

    ``rtt_s`` is how long a ping takes, as if the node were that far away; ``padding`` adds that
    many bytes to every token's text.
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
    load: EngineLoad | None = None
    submits: list[Submit] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    drills: list[Drill] = field(default_factory=list)
    drill_error: str = ""
    attaches: list[Attach] = field(default_factory=list)
    answers: dict[tuple[str, str], Spoken] = field(default_factory=dict)
    max_version: int = MAX_VERSION
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    connections: list[_Connection] = field(default_factory=list)
    address: str = ""
    _server: asyncio.Server | None = None

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        """Listen on a free loopback port."""
        self.go.set()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, ssl=tls)
        self.address = format_address(*self._server.sockets[0].getsockname()[:2])

    async def stop(self) -> None:
        """Close the listener and every connection."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.drop()
        await asyncio.sleep(0)

    def hello(self) -> Hello:
        """The greeting."""
        return Hello(
            min_version=MIN_VERSION,
            max_version=self.max_version,
            mesh=self.mesh_name,
            kind="node",
            name=self.name,
            site=self.site,
            incarnation=f"{self.name}-1",
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
        return Load([self.load or idle_engine(self.model)], [], False)

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
                leg = asyncio.ensure_future(self._run(message))
                self.legs[message.stream] = leg
                leg.add_done_callback(lambda _: self._forget(message.stream))
            case Cancel(stream):
                self.node.cancels.append(stream)
                running = self.legs.get(stream)
                if running is not None:
                    running.cancel()
                    self.say(Finished(stream, "cancelled", 0, 0.0, 0.0, None))
            case Drill():
                self.node.drills.append(message)
                self.say(DrillStarted(message.number, self.node.drill_error))
            case Attach():
                self.node.attaches.append(message)
                self.say(self._attached(message))
            case Hello() | Goodbye():
                pass
            case _:
                raise AssertionError(f"a router said {message}")

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
        asyncio.ensure_future(self.node.note())  # noqa: RUF006

    # ---- one leg ------------------------------------------------------------------------------

    async def _run(self, submit: Submit) -> None:
        await self.node.note()
        node, faults = self.node, self._faults(submit)
        if faults is not None and faults.refuse is not None:
            code, retryable = faults.refuse
            self.say(Refused(submit.stream, code, f"told to refuse: {code}", retryable, 0))
            return
        if prompt_tokens(submit.input) > node.context_tokens:
            text = f"the prompt exceeds {node.context_tokens} tokens"
            self.say(Refused(submit.stream, "context_length_exceeded", text, False, 0))
            return
        self.say(Accepted(submit.stream, prompt_tokens(submit.input), 0))
        ids = list(submit.forced_ids)
        if submit.leg == "decode":
            assert submit.transfer is not None
            handed = await node.mesh.commit(submit.transfer.id)
            if not handed:  # the answer ended before the hand-over
                self.say(Failed(submit.stream, "answer_complete", "complete", False))
                return
            assert handed[: len(ids)] == ids, "the hand-over does not continue the forced ids"
            ids = list(handed)
        await self._generate(submit, ids, faults)

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
                assert submit.transfer is not None
                commit = node.mesh.commit(submit.transfer.id)
                if not commit.done():
                    commit.set_result(list(ids))
                report = TransferReport(1000, 1000, 900, 10.0, 11.0, 1.0, 0.1)
                self.say(Finished(stream, "handoff", len(ids), 1.0, 10.0, report))
                return
            await asyncio.sleep(0)
        if submit.leg == "prefill":
            assert submit.transfer is not None
            commit = node.mesh.commit(submit.transfer.id)
            if not commit.done():
                commit.set_result([])
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
