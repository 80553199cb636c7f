"""The link to a node: greeting, refusal, measuring, dying, coming back, long messages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

import router.node_link
from router.node_link import LinkEvents, LinkIdentity, NodeLink, StreamMessage
from tests.fakes.fake_node import FakeMesh, FakeNode
from tests.router.router_mesh import make_topology
from wire.address import Dialer
from wire.errors import MeshError
from wire.messages import (
    CacheDelta,
    Cancel,
    Hello,
    Load,
    Sampling,
    StepEntry,
    Submit,
    TextInput,
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
    )


@asynccontextmanager
async def linked(
    node: FakeNode, as_identity: LinkIdentity | None = None
) -> AsyncIterator[tuple[NodeLink, Heard]]:
    await node.start()
    heard = Heard()
    known = make_topology().nodes["fra-1"]
    link = NodeLink(
        known, node.address, as_identity or identity(), events(heard), random.Random(0), 5.0
    )
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


async def test_silence_is_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.node_link, "PING_INTERVAL_S", 0.02)
    node = fake()
    node.rtt_s = 3600.0
    async with linked(node) as (link, heard):
        await heard.wait("down")
        assert "nothing heard" in (link.last_error or "")


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
