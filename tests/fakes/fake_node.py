"""A fake node: speaks the mesh wire, computes nothing, and says so in every token.

Its answers are those of ``fake_answer.py``. Prefill and decode legs hand over through a
``FakeMesh`` in memory instead of a KV stream; a prefill leg whose hand-over breaks detaches and
takes another decode node, as real ones do (``fake_connection.py``). Faults are set on the node
before or while requests run.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from tests.fakes.fake_connection import FakeConnection, FakeMesh, Faults, Spoken
from wire.address import format_address
from wire.messages import (
    MAX_VERSION,
    MIN_VERSION,
    Attach,
    CacheDelta,
    Drill,
    EngineLoad,
    Hello,
    Load,
    ModelOffer,
    NodeMessage,
    Retarget,
    Role,
    Submit,
    Warm,
    Warmth,
)


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
    connections: list[FakeConnection] = field(default_factory=list)
    address: str = ""
    _server: asyncio.Server | None = None

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        """A new incarnation: listen on a free loopback port, or where it listened before."""
        self.starts += 1
        self.go.set()
        loop = asyncio.get_running_loop()
        port = int(self.address.rpartition(":")[2] or 0)
        self._server = await loop.create_server(
            lambda: FakeConnection(self), "127.0.0.1", port, ssl=tls, reuse_address=True
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


def cache_delta(model: str, chain: list[bytes], tokens_per_span: int) -> CacheDelta:
    """A digest that says "I hold all of this chain"."""
    added = [(value, (i + 1) * tokens_per_span) for i, value in enumerate(chain)]
    return CacheDelta(model, False, added, [])
