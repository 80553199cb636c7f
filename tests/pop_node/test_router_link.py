"""The node's end of the mesh wire over a real socket, with a fake agent behind it."""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager

import pytest

from pop_node import router_link
from pop_node.router_link import STEP_BYTES, link_factory
from wire.errors import PeerError
from wire.framing import MAX_FRAME_BYTES, FrameWriter, encode, router_side_reader
from wire.messages import (
    MAX_VERSION,
    CacheDelta,
    Cancel,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Sampling,
    Step,
    StepEntry,
    Submit,
    TextInput,
)


def hello(kind="router", low=1, high=1, name="r1"):
    return Hello(low, high, "mesh", kind, name, "ams", "i1", [], [])


def submit(text="hi"):
    sampling = Sampling(1, 0.0, 1.0, 1, [], False)
    return Submit(1, "r", 1, "both", "m", "", TextInput(text), sampling, [], None, [], 1000)


class FakeAgent:
    """A fake: records what the link hands it."""

    def __init__(self):
        self.heard = asyncio.Queue()

    def hello(self):
        return hello("node", name="n1")

    def authorize_router(self, greeting, ssl_object):
        if greeting.name == "stranger":
            raise PeerError("not in this mesh", code="identity_mismatch", retryable=False)

    def router_joined(self, link):
        self.heard.put_nowait(("joined", link))

    def router_left(self, link):
        self.heard.put_nowait(("left", link))

    def submit(self, link, message):
        self.heard.put_nowait(("submit", message))

    def cancel(self, link, stream):
        self.heard.put_nowait(("cancel", stream))


class Router:
    """The far end, spoken by hand."""

    def __init__(self, reader, writer, agent):
        self.reader, self.writer, self.agent = reader, writer, agent
        self.frames = router_side_reader()
        self.pending = []

    def send(self, *messages):
        self.writer.write(b"".join(encode(m) for m in messages))

    async def receive(self):
        while not self.pending:
            data = await self.reader.read(65536)
            assert data, "the node closed the link"
            self.pending += self.frames.feed(data)
        return self.pending.pop(0)

    async def closed(self):
        while await self.reader.read(65536):
            pass
        return True


@asynccontextmanager
async def linked():
    loop = asyncio.get_running_loop()
    agent = FakeAgent()
    server = await loop.create_server(link_factory(agent), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        yield Router(reader, writer, agent)
    finally:
        writer.close()
        server.close()


async def greeted(router):
    router.send(hello())
    assert (await router.receive()).name == "n1"
    kind, link = await router.agent.heard.get()
    assert kind == "joined"
    return link


async def test_greeting_pings_submits_and_cancels():
    async with linked() as router:
        await greeted(router)
        router.send(Ping(7), submit(), Cancel(1))
        assert await router.receive() == Pong(7)
        assert await router.agent.heard.get() == ("submit", submit())
        assert await router.agent.heard.get() == ("cancel", 1)


async def test_a_long_prompt_arrives_in_parts_and_a_cancel_overtakes_it():
    async with linked() as router:
        await greeted(router)
        writer = FrameWriter()
        assert writer.push(submit("x" * 300_000)) == b""
        router.writer.write(writer.next_bulk() + encode(Cancel(9)))
        while frame := writer.next_bulk():
            router.writer.write(frame)
        assert await router.agent.heard.get() == ("cancel", 9)
        _, message = await router.agent.heard.get()
        assert len(message.input.text) == 300_000


async def test_one_step_frame_for_all_streams_then_what_is_said():
    async with linked() as router:
        link = await greeted(router)
        entries = [StepEntry(n, 0, [n], b"t") for n in range(5)]
        for entry in entries:
            link.emit(entry)
        link.say(Pong(1))
        assert await router.receive() == Step(entries)
        assert await router.receive() == Pong(1)


async def test_a_huge_step_is_split_below_the_frame_limit():
    async with linked() as router:
        link = await greeted(router)
        text = b"x" * 1000
        for n in range(200):
            link.emit(StepEntry(n, 0, [n], text))
        link.flush()
        seen = []
        while len(seen) < 200:
            step = await router.receive()
            assert len(encode(step)) <= MAX_FRAME_BYTES
            seen += [entry.stream for entry in step.entries]
        assert seen == list(range(200))
        assert STEP_BYTES < MAX_FRAME_BYTES


async def test_a_large_message_gives_way_to_small_ones():
    async with linked() as router:
        link = await greeted(router)
        big = CacheDelta("m", True, [(bytes(16), 1)] * 8192, [])
        link.say(big)
        link.say(Pong(3))
        got = [await router.receive(), await router.receive()]
        assert big in got
        assert Pong(3) in got


@pytest.mark.parametrize(
    ("greeting", "code"),
    [
        (hello(low=MAX_VERSION + 1, high=MAX_VERSION + 8), "version_mismatch"),
        (hello(name="stranger"), "identity_mismatch"),
        (submit(), "protocol_error"),
    ],
)
async def test_who_does_not_belong_is_told_why(greeting, code):
    async with linked() as router:
        router.send(greeting)
        message = await router.receive()
        assert isinstance(message, Goodbye)
        assert message.code == code
        assert await router.closed()
        assert router.agent.heard.empty()


@pytest.mark.parametrize(
    "garbage",
    [b"\xff" * 64, struct.pack("<I", MAX_FRAME_BYTES + 1), b"\x05\x00\x00\x00hello", b"GET / HTTP"],
)
async def test_garbage_closes_the_link_and_frees_the_router(garbage):
    async with linked() as router:
        await greeted(router)
        router.writer.write(garbage)
        assert await router.closed()
        assert (await router.agent.heard.get())[0] == "left"


async def test_a_second_hello_is_a_violation():
    async with linked() as router:
        await greeted(router)
        router.send(hello())
        assert (await router.receive()).code == "protocol_error"


async def test_a_silent_router_is_given_up(monkeypatch):
    monkeypatch.setattr(router_link, "HELLO_TIMEOUT_S", 0.05)
    monkeypatch.setattr(router_link, "WATCH_PERIOD_S", 0.05)
    monkeypatch.setattr(router_link, "SILENCE_S", 0.2)
    async with linked() as router:
        await greeted(router)
        goodbye = await router.receive()
        assert goodbye.code == "link_lost"
        assert await router.closed()
        assert (await router.agent.heard.get())[0] == "left"


async def test_a_router_that_does_not_read_is_given_up(monkeypatch):
    monkeypatch.setattr(router_link, "HELLO_TIMEOUT_S", 0.05)
    monkeypatch.setattr(router_link, "WATCH_PERIOD_S", 0.05)
    monkeypatch.setattr(router_link, "STALL_S", 0.2)
    monkeypatch.setattr(router_link, "CLOSE_WAIT_S", 0.05)
    async with linked() as router:
        link = await greeted(router)
        router.writer.transport.pause_reading()
        big = CacheDelta("m", True, [(bytes(16), 1)] * 8192, [])
        for _ in range(60):  # more than the kernel's buffers hold
            link.say(big)
        assert (await router.agent.heard.get())[0] == "left"


async def test_a_link_that_was_told_goodbye_ends_though_nobody_reads(monkeypatch):
    monkeypatch.setattr(router_link, "CLOSE_WAIT_S", 0.05)
    async with linked() as router:
        link = await greeted(router)
        router.writer.transport.pause_reading()
        for _ in range(60):
            link.say(CacheDelta("m", True, [(bytes(16), 1)] * 8192, []))
        link.close()
        assert (await router.agent.heard.get())[0] == "left"


async def test_tokens_of_one_step_that_follow_each_other_are_one_entry():
    async with linked() as router:
        router.send(hello("router"))
        await router.receive()
        _, link = await router.agent.heard.get()
        for entry in (
            StepEntry(7, 0, [1], b"a"),
            StepEntry(7, 1, [2], b"b"),
            StepEntry(8, 4, [5], b""),
            StepEntry(7, 2, [3], b"c"),
            StepEntry(7, 4, [6], b"e"),
        ):
            link.emit(entry)
        link.flush()
        together = [StepEntry(7, 0, [1, 2], b"ab"), StepEntry(8, 4, [5], b"")]
        apart = [StepEntry(7, 2, [3], b"c"), StepEntry(7, 4, [6], b"e")]
        assert await router.receive() == Step(together + apart)
