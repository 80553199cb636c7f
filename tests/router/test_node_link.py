"""The link to a node: greeting, refusal, measuring, dying, coming back, long messages."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from router.links.link_words import LinkEvents, LinkIdentity, StreamMessage
from router.links.node_connection import MAX_BULK_BACKLOG, NodeConnection
from router.links.node_link import NodeLink
from tests.fakes.fake_connection import FakeMesh
from tests.fakes.fake_node import FakeNode
from tests.router.router_mesh import make_topology
from wire.address import Dialer
from wire.errors import MeshError, PeerError
from wire.messages import (
    COLD_START,
    MAX_VERSION,
    CacheDelta,
    Cancel,
    Drill,
    DrillReport,
    DrillStarted,
    Hello,
    Load,
    Loading,
    Offers,
    Retarget,
    Sampling,
    StepEntry,
    Submit,
    TextInput,
    Transfer,
    Warm,
)


@dataclass
class Heard:
    """Everything a link reported, in order; ``changed`` wakes waiters."""

    log: list[tuple[str, object]] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def note(self, what: str, value: object = None) -> None:
        self.log.append((what, value))
        asyncio.ensure_future(self._wake())  # noqa: RUF006

    async def _wake(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def count(self, what: str) -> int:
        return sum(name == what for name, _ in self.log)

    async def wait(self, what: str, times: int = 1) -> None:
        async with self.changed, asyncio.timeout(20):
            await self.changed.wait_for(lambda: self.count(what) >= times)

    # a StreamListener
    def tokens(self, node: str, entry: StepEntry) -> None:
        self.note("tokens", entry)

    def said(self, node: str, message: StreamMessage) -> None:
        self.note("said", message)

    def link_lost(self, node: str) -> None:
        self.note("link_lost")


def identity(mesh: str = "test") -> LinkIdentity:
    return LinkIdentity(mesh, "router-1", "fra", "inc", Dialer(), None)


def events(heard: Heard) -> LinkEvents:
    def up(name: str, hello: Hello) -> None:
        heard.note("up", hello)

    def down(name: str, error: MeshError) -> None:
        heard.note("down", error)

    def load(name: str, message: Load) -> None:
        heard.note("load", message)

    def cache(name: str, delta: CacheDelta) -> None:
        heard.note("cache", delta)

    return LinkEvents(
        up=up,
        down=down,
        rtt=lambda name, rtt_ms: heard.note("rtt", rtt_ms),
        load=load,
        cache=cache,
        draining=lambda name: heard.note("draining"),
        offers=lambda name, models: heard.note("offers", models),
    )


@asynccontextmanager
async def linked(
    node: FakeNode, as_identity: LinkIdentity | None = None, detection_s: float = 5.0
) -> AsyncIterator[tuple[NodeLink, Heard]]:
    await node.start()
    heard = Heard()
    known = make_topology().nodes["fra-1"]
    who = as_identity or identity()
    link = NodeLink(known, node.address, who, events(heard), random.Random(0), detection_s)
    task = asyncio.ensure_future(link.run())
    try:
        yield link, heard
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await node.stop()


async def first_error(link: NodeLink) -> str:
    """What the link complains about, once it does."""
    async with asyncio.timeout(10):
        while link.last_error is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return link.last_error


def fake(**changes: str) -> FakeNode:
    return FakeNode(**({"name": "fra-1", "site": "fra", "mesh": FakeMesh()} | changes))  # type: ignore[arg-type]


def submit(stream: int, text: str = "p") -> Submit:
    sampling = Sampling(3, 0.0, 1.0, 1, [], False)
    return Submit(
        stream, "r", 1, "both", "fake-model", "", TextInput(text), sampling, [], None, [], 60_000
    )


async def test_greets_measures_and_carries_a_stream() -> None:
    async with linked(fake()) as (link, heard):
        await heard.wait("rtt")
        await heard.wait("load")
        assert heard.log[0][0] == "up"
        assert link.up
        link.open(1, heard)
        assert link.send(submit(1))
        await heard.wait("said", 2)
        assert heard.count("tokens") == 3
        assert link.rtt_ms is not None


async def test_comes_back_and_tells_open_streams() -> None:
    node = fake()
    async with linked(node) as (link, heard):
        await heard.wait("up")
        link.open(1, heard)
        node.connections[0].drop()
        await heard.wait("link_lost")
        await heard.wait("up", 2)
        assert link.num_streams == 0
        assert link.reconnects == 1


@pytest.mark.parametrize(
    ("node", "word"),
    [
        (fake(name="lhr-1"), "lhr-1"),
        (fake(site="iad"), "iad"),
        (fake(mesh_name="other"), "other"),
    ],
    ids=["name", "site", "mesh"],
)
async def test_the_wrong_peer_is_refused(node: FakeNode, word: str) -> None:
    async with linked(node) as (link, heard):
        assert word in await first_error(link)
        assert not link.up
        assert heard.count("up") == 0


async def test_silence_is_death_after_the_detection_time() -> None:
    node = fake()
    node.rtt_s = 3600.0
    async with linked(node, detection_s=0.25) as (link, heard):
        await heard.wait("up")
        link.open(1, heard)
        await heard.wait("link_lost")
        assert "nothing heard from fra-1 for 0.25 s" in (link.last_error or "")


async def test_nothing_listens() -> None:
    heard = Heard()
    known = make_topology().nodes["fra-1"]
    link = NodeLink(known, "127.0.0.1:1", identity(), events(heard), random.Random(0), 5.0)
    task = asyncio.ensure_future(link.run())
    assert "cannot reach 127.0.0.1:1" in await first_error(link)
    assert not link.send(Cancel(1))
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_off_loopback_needs_certificates() -> None:
    heard = Heard()
    known = make_topology().nodes["fra-1"]
    link = NodeLink(known, "192.0.2.1:9", identity(), events(heard), random.Random(0), 5.0)
    task = asyncio.ensure_future(link.run())
    assert "no certificate" in await first_error(link)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_long_messages_arrive_and_are_overtaken() -> None:
    node = fake()
    node.context_tokens = 10_000_000
    async with linked(node) as (link, heard):
        await heard.wait("up")
        link.send(submit(7, "x" * 3_000_000))
        link.send(Cancel(99))
        await node.wait_until(lambda: bool(node.submits))
        assert len(node.submits[0].input.text) == 3_000_000  # type: ignore[union-attr]
        assert node.cancels[0] == 99
        # Nobody listens to stream 7: the router says so when the node accepts it.
        await node.wait_until(lambda: 7 in node.cancels)


# ---- frozen nodes ------------------------------------------------------------------------------


async def test_a_slow_node_is_not_a_dead_one() -> None:
    """Anything heard counts, not only answers to pings."""
    node = fake()
    async with linked(node, detection_s=0.3) as (link, heard):
        await heard.wait("rtt")
        node.rtt_s = 3600.0
        for _ in range(8):
            await asyncio.sleep(0.1)
            node.tell(node.load_message())
        assert link.up
        await heard.wait("down")


async def test_our_own_standstill_is_not_a_nodes_silence() -> None:
    """A router that was stopped for longer than its detection time keeps its links."""
    node = fake()
    async with linked(node, detection_s=0.4) as (link, heard):
        await heard.wait("rtt")
        for _ in range(3):
            time.sleep(1.0)  # noqa: ASYNC251 - the whole process stands still
            pings = heard.count("rtt")
            await heard.wait("rtt", pings + 2)
        assert heard.count("down") == 0
        assert link.reconnects == 0


async def test_a_frozen_node_keeps_no_socket_and_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link to a node that reads nothing ends without waiting for it to read."""
    closed = asyncio.Event()
    monkeypatch.setattr(NodeConnection, "connection_lost", lambda self, exc: closed.set())
    node = fake()
    node.context_tokens = 10_000_000
    async with linked(node, detection_s=0.4) as (link, heard):
        await heard.wait("up")
        transport = node.connections[0]._transport
        assert transport is not None
        transport.pause_reading()
        for stream in range(1, 4):
            link.open(stream, heard)
            link.send(submit(stream, "x" * 9_000_000))
        await heard.wait("link_lost", 3)
        async with asyncio.timeout(10):
            await closed.wait()
        transport.resume_reading()
        await heard.wait("up", 2)
        assert node.submits == []


class StuckTransport(asyncio.Transport):
    """Takes nothing after the first write, like a full socket buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview[int]) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


async def test_parts_for_a_stalled_node_are_bounded() -> None:
    connection = NodeConnection(identity().hello(), lambda _: None, lambda _: None)
    transport = StuckTransport()
    connection.connection_made(transport)
    connection.pause_writing()
    sent = 0
    while not connection.closed.done():
        sent += 10_000_000
        connection.send(submit(1, "x" * 10_000_000))
        assert sent <= MAX_BULK_BACKLOG + 20_000_000
    assert sent > MAX_BULK_BACKLOG
    assert "reads nothing" in connection.closed.result().message
    connection.abort()
    assert transport.aborted


async def test_words_of_version_2_have_no_way_to_an_older_node() -> None:
    node = fake()
    node.max_version = 1
    async with linked(node) as (link, heard):
        await heard.wait("up")
        assert link.version == 1
        assert not link.retarget(Retarget(1, 2, Transfer(bytes(16), "lhr-1", "127.0.0.1:1")))
        link.send(Cancel(3))
        await node.wait_until(lambda: node.cancels == [3])
        assert node.retargets == []


async def test_the_greeting_agrees_on_a_version() -> None:
    node = fake()
    async with linked(node) as (link, heard):
        assert link.version == 0
        await heard.wait("up")
        assert link.version == MAX_VERSION
        assert link.incarnation == "fra-1-1"
        assert link.retarget(Retarget(1, 2, Transfer(bytes(16), "lhr-1", "127.0.0.1:1")))
        await node.wait_until(lambda: len(node.retargets) == 1)


async def test_words_of_version_3_have_no_way_to_an_older_node() -> None:
    node = fake()
    node.max_version = 2
    async with linked(node) as (link, heard):
        assert not link.warm(Warm("fake-model", 1000))  # there is no connection yet
        await heard.wait("up")
        assert not link.warm(Warm("fake-model", 1000))
        with pytest.raises(PeerError, match="needs 3"):
            await link.ask(7, Drill(7, COLD_START, "fake-model", 1000))
        link.send(Cancel(3))
        await node.wait_until(lambda: node.cancels == [3])
        assert (node.warms, node.drills) == ([], [])


async def test_what_a_node_says_of_its_models_is_heard() -> None:
    node = fake()
    async with linked(node) as (link, heard):
        await heard.wait("up")
        assert link.warm(Warm("fake-model", 1000))
        await node.wait_until(lambda: node.warms == [Warm("fake-model", 1000)])
        node.tell(Offers(node.hello().models))
        await heard.wait("offers")
        assert ("offers", node.hello().models) in heard.log
        node.tell(Loading(99, 2000))  # of a stream that nobody knows any more
        await node.wait_until(lambda: node.cancels == [99])
        assert link.unknown_stream_messages == 1


async def test_a_drill_that_reports_is_answered_by_its_report_or_its_refusal() -> None:
    node = fake()
    report = DrillReport(7, b"{}", "")
    node.cold_start = lambda drill: node.tell(report)
    async with linked(node) as (link, heard):
        await heard.wait("up")
        assert await link.ask(7, Drill(7, COLD_START, "fake-model", 1000)) == report
        node.drill_error = "a drill is held already"
        refused = await link.ask(8, Drill(8, COLD_START, "fake-model", 1000))
        assert refused == DrillStarted(8, "a drill is held already")
