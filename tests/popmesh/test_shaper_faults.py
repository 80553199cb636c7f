"""Links that break and heal under live connections, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from popmesh.links.control import both_ways
from popmesh.links.pipe import reset
from popmesh.links.plan import EmulatedLink, LinkFault, LinkPlan, ShapedPort
from popmesh.links.shaper import Shaper
from wire.address import parse_address

BOUND_S = 10.0
"""Nothing here takes a second; a machine under load may be slow."""

SILENCE_S = 0.15
"""How long "nothing comes" is watched: seven round trips of these links."""


class Bench:
    """One shaped port from AMS to NYC and the server behind it, which keeps its connections."""

    def __init__(self, shaper: Shaper, plan: LinkPlan) -> None:
        self.shaper, self.plan = shaper, plan
        self.accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.Queue(8)
        )

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*parse_address(self.plan.ports[0].listen))

    async def pair(self) -> tuple[Any, Any, Any, Any]:
        """(client's reader and writer, server's reader and writer) of one new connection."""
        client = await self.connect()
        async with asyncio.timeout(BOUND_S):
            return *client, *(await self.accepted.get())

    def faults(self, *faults: LinkFault) -> None:
        self.shaper.reconfigure(msgspec.structs.replace(self.plan, faults=list(faults)))

    def cut(self) -> None:
        links = [msgspec.structs.replace(self.plan.links[0], cuts=self.plan.links[0].cuts + 1)]
        self.plan = msgspec.structs.replace(self.plan, links=links)
        self.shaper.reconfigure(self.plan)


@contextlib.asynccontextmanager
async def bench(rtt_ms: float = 20.0, mbps: float = 800.0) -> AsyncIterator[Bench]:
    def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        here.accepted.put_nowait((reader, writer))
        writers.append(writer)

    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(keep, "127.0.0.1", 0)
    with socket.socket() as spare:
        spare.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{spare.getsockname()[1]}"
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    plan = LinkPlan(
        [EmulatedLink("AMS", "NYC", rtt_ms, mbps)], [ShapedPort(listen, target, "AMS", "NYC")]
    )
    here = Bench(Shaper(plan, random.Random(11)), plan)
    ready = asyncio.Event()
    task = asyncio.create_task(here.shaper.serve(ready))
    await asyncio.wait_for(ready.wait(), BOUND_S)
    try:
        yield here
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        for writer in writers:
            writer.close()
        server.close()


async def silent(reader: asyncio.StreamReader) -> bool:
    """Nothing comes, not even an end."""
    try:
        data = await asyncio.wait_for(reader.read(1), SILENCE_S)
    except TimeoutError:
        return True
    raise AssertionError(f"it says {data!r}")


async def exactly(reader: asyncio.StreamReader, text: bytes) -> None:
    assert await asyncio.wait_for(reader.readexactly(len(text)), BOUND_S) == text


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_a_dead_link_swallows_in_silence_and_gives_all_back_when_it_heals():
    async with bench() as here:
        reader, writer, far_reader, far_writer = await here.pair()
        writer.write(b"before")
        await exactly(far_reader, b"before")
        here.faults(*both_ways("AMS", "NYC", down=True))
        for word in (b"one ", b"two ", b"three"):
            writer.write(word)
            await writer.drain()
        far_writer.write(b"answer")
        assert await silent(far_reader)
        assert await silent(reader)
        here.faults()
        await exactly(far_reader, b"one two three")
        await exactly(reader, b"answer")
        await close(writer)


async def test_what_was_on_its_way_when_the_link_died_arrives_once_it_lives():
    async with bench(rtt_ms=400.0) as here:
        _, writer, far_reader, _ = await here.pair()
        writer.write(b"flying")
        await writer.drain()
        (accepted,) = here.shaper._open
        async with asyncio.timeout(BOUND_S):
            while not accepted.outgoing.direction._flying:  # noqa: ASYNC110 - a heap tells nobody
                await asyncio.sleep(0.001)
        here.faults(*both_ways("AMS", "NYC", down=True))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(far_reader.read(1), 0.4)  # it was 0.2 s from arriving
        here.faults()
        await exactly(far_reader, b"flying")
        await close(writer)


async def test_one_way_only_that_way_is_silent():
    async with bench() as here:
        reader, writer, far_reader, far_writer = await here.pair()
        here.faults(LinkFault("AMS", "NYC", down=True))
        writer.write(b"lost")
        far_writer.write(b"heard")
        await exactly(reader, b"heard")
        assert await silent(far_reader)
        here.faults()
        await exactly(far_reader, b"lost")
        await close(writer)


@pytest.mark.parametrize("way", [("AMS", "NYC"), ("NYC", "AMS")])
async def test_a_new_connection_hangs_until_both_ways_are_up(way):
    async with bench() as here:
        here.faults(LinkFault(*way, down=True))
        reader, writer = await here.connect()
        writer.write(b"hello")
        assert await silent(reader)
        assert here.accepted.empty()
        here.faults()
        far_reader, far_writer = await asyncio.wait_for(here.accepted.get(), BOUND_S)
        await exactly(far_reader, b"hello")
        far_writer.write(b"welcome")
        await exactly(reader, b"welcome")
        await close(writer)


async def test_a_link_that_dies_during_a_handshake_makes_it_hang():
    async with bench(rtt_ms=200.0) as here:
        reader, writer = await here.connect()
        writer.write(b"hello")
        async with asyncio.timeout(BOUND_S):
            while not here.shaper._open:  # noqa: ASYNC110 - a set tells nobody
                await asyncio.sleep(0.001)
        here.faults(*both_ways("AMS", "NYC", down=True))
        assert await silent(reader)
        assert here.accepted.empty()
        here.faults()
        far_reader, _ = await asyncio.wait_for(here.accepted.get(), BOUND_S)
        await exactly(far_reader, b"hello")
        await close(writer)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_gives_up_hanging_was_never_heard_of(how):
    async with bench() as here:
        here.faults(*both_ways("AMS", "NYC", down=True))
        _, writer = await here.connect()
        writer.write(b"hello")
        await writer.drain()
        if how == "reset":
            reset(writer.transport)
        else:
            await close(writer)
        async with asyncio.timeout(BOUND_S):
            while here.shaper._open:  # noqa: ASYNC110 - a set tells nobody
                await asyncio.sleep(0.005)
        here.faults()
        _, writer, far_reader, _ = await here.pair()
        writer.write(b"next")
        await exactly(far_reader, b"next")
        assert here.accepted.empty()
        await close(writer)


async def test_a_reset_behind_a_dead_link_is_heard_after_it_and_the_bytes_never():
    async with bench() as here:
        _, writer, far_reader, _ = await here.pair()
        here.faults(*both_ways("AMS", "NYC", down=True))
        writer.write(b"never")
        await writer.drain()
        (accepted,) = here.shaper._open
        async with asyncio.timeout(BOUND_S):
            while not accepted.outgoing.held_bytes:  # noqa: ASYNC110 - a count tells nobody
                await asyncio.sleep(0.001)
        reset(writer.transport)
        assert await silent(far_reader)
        here.faults()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(far_reader.read(), BOUND_S)


async def test_an_orderly_end_behind_a_dead_link_follows_its_bytes():
    async with bench() as here:
        reader, writer, far_reader, _ = await here.pair()
        here.faults(LinkFault("AMS", "NYC", down=True))
        writer.write(b"the end")
        writer.write_eof()
        assert await silent(far_reader)
        here.faults()
        assert await asyncio.wait_for(far_reader.read(), BOUND_S) == b"the end"
        assert await silent(reader)
        await close(writer)


async def test_a_dead_link_fills_windows_not_memory():
    async with bench(rtt_ms=1.0) as here:
        _, writer, far_reader, _ = await here.pair()
        here.faults(*both_ways("AMS", "NYC", down=True))
        chunk, sent = bytes(1 << 20), 0
        with contextlib.suppress(TimeoutError):
            while sent < 256:
                writer.write(chunk)
                await asyncio.wait_for(writer.drain(), 0.5)
                sent += 1
        assert sent < 256, "nothing ever pushed back"
        (accepted,) = here.shaper._open
        bound = accepted.outgoing.direction.line.buffer_bytes
        assert accepted.outgoing.held_bytes <= bound + (1 << 18)  # one read past the bound
        here.faults()
        for _ in range(sent + 1):
            await exactly(far_reader, chunk)
        await close(writer)


async def test_a_cut_resets_both_ends_now_and_lets_new_ones_in():
    async with bench(rtt_ms=400.0) as here:
        reader, writer, far_reader, _ = await here.pair()
        writer.write(b"too late")
        here.cut()
        for end in (reader, far_reader):
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(end.read(), BOUND_S)
        reader, writer, far_reader, _ = await here.pair()
        writer.write(b"again")
        await exactly(far_reader, b"again")
        here.shaper.reconfigure(here.plan)  # the same count: nothing is cut
        writer.write(b" and on")
        await exactly(far_reader, b" and on")
        await close(writer)


async def test_a_cut_reaches_what_a_dead_link_left_half_open():
    async with bench() as here:
        _, writer, far_reader, _ = await here.pair()
        here.faults(*both_ways("AMS", "NYC", down=True))
        reset(writer.transport)
        assert await silent(far_reader)
        here.cut()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(far_reader.read(), BOUND_S)
        assert not here.shaper._open


async def test_directions_differ():
    """10 Mbit/s one way: 100 kB take 80 ms there and no time to speak of on the way back."""
    loop = asyncio.get_running_loop()
    async with bench(rtt_ms=2.0) as here:
        reader, writer, far_reader, far_writer = await here.pair()
        here.faults(LinkFault("AMS", "NYC", bandwidth_mbps=10.0, one_way_ms=50.0))
        block, started = bytes(100_000), loop.time()
        writer.write(block)
        await exactly(far_reader, block)
        assert loop.time() - started >= 0.125
        figures = here.shaper._plan.figures("NYC", "AMS")
        assert figures.rate_bytes_per_s == 100e6
        assert figures.rtt_s == pytest.approx(0.051)
        far_writer.write(block)
        await exactly(reader, block)
        await close(writer)


async def test_nothing_is_lost_or_swapped_in_bad_weather():
    rng = random.Random(2)
    async with bench(rtt_ms=4.0) as here:
        reader, writer, far_reader, far_writer = await here.pair()
        here.faults(*both_ways("AMS", "NYC", jitter_ms=10.0, loss=0.05))
        block = rng.randbytes(300_000)
        for at in range(0, len(block), 10_000):
            writer.write(block[at : at + 10_000])
            far_writer.write(block[at : at + 10_000])
            await asyncio.sleep(0)
        await exactly(far_reader, block)
        await exactly(reader, block)
        await close(writer)


async def test_a_restored_link_keeps_its_rate():
    """Waiting earns nothing: 100 kB at 10 Mbit/s still take 80 ms after an outage of longer."""
    loop = asyncio.get_running_loop()
    async with bench(rtt_ms=2.0, mbps=10.0) as here:
        _, writer, far_reader, _ = await here.pair()
        here.faults(*both_ways("AMS", "NYC", down=True))
        block = bytes(100_000)
        writer.write(block)
        assert await silent(far_reader)
        started = loop.time()
        here.faults()
        await exactly(far_reader, block)
        assert loop.time() - started >= 0.079
        await close(writer)
