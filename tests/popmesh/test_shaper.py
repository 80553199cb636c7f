"""The shaper on real sockets: bytes, ends and back-pressure; timing only as lower bounds."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import time
from collections.abc import AsyncIterator

import pytest

from popmesh.links.plan import EmulatedLink, LinkPlan, ShapedPort
from popmesh.links.shaper import Shaper
from wire.address import parse_address
from wire.errors import ConfigError


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def plan_for(target: int, *, rtt_ms: float = 20.0, mbps: float = 800.0) -> LinkPlan:
    listen = f"127.0.0.1:{free_port()}"
    return LinkPlan(
        [EmulatedLink("AMS", "NYC", rtt_ms, mbps)],
        [ShapedPort(listen, f"127.0.0.1:{target}", "AMS", "NYC")],
    )


@contextlib.asynccontextmanager
async def running(plan: LinkPlan) -> AsyncIterator[Shaper]:
    shaper = Shaper(plan, random.Random(7))
    ready = asyncio.Event()
    task = asyncio.create_task(shaper.serve(ready))
    await asyncio.wait_for(ready.wait(), 5)
    try:
        yield shaper
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def server(handler) -> AsyncIterator[int]:
    listener = await asyncio.start_server(handler, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what comes, ends when the client has ended."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except ConnectionError:
        pass
    finally:
        writer.close()


def connect(plan: LinkPlan):
    return asyncio.open_connection(*parse_address(plan.ports[0].listen))


async def test_bytes_come_back_whole_and_no_sooner_than_the_round_trip():
    async with server(echo) as target:
        plan = plan_for(target, rtt_ms=40.0)
        async with running(plan):
            reader, writer = await connect(plan)
            writer.write(b"x")
            assert await asyncio.wait_for(reader.readexactly(1), 5) == b"x"
            started = time.monotonic()
            writer.write(b"ping")
            assert await asyncio.wait_for(reader.readexactly(4), 5) == b"ping"
            assert time.monotonic() - started >= 0.038  # each way may round by half a tick
            writer.close()
            await writer.wait_closed()


async def test_a_connection_costs_its_handshake():
    async with server(echo) as target:
        plan = plan_for(target, rtt_ms=40.0)
        async with running(plan):
            started = time.monotonic()
            reader, writer = await connect(plan)
            writer.write(b"first")
            assert await asyncio.wait_for(reader.readexactly(5), 5) == b"first"
            assert time.monotonic() - started >= 0.077
            writer.close()
            await writer.wait_closed()


async def test_half_close_passes_and_the_other_half_keeps_flowing():
    async def answer_after_end(reader, writer):
        everything = await reader.read()
        writer.write(everything[::-1])
        writer.close()

    async with server(answer_after_end) as target:
        plan = plan_for(target)
        async with running(plan):
            reader, writer = await connect(plan)
            writer.write(b"abc")
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 5) == b"cba"
            writer.close()
            await writer.wait_closed()


async def test_two_connections_share_the_rate_of_their_pair():
    total = 100_000  # each way is 10 Mbit/s = 1.25 MB/s: 80 ms for one, 160 ms for both
    done = asyncio.Event()

    async def sink(reader, writer):
        received = 0
        while data := await reader.read(65536):
            received += len(data)
        assert received == total
        writer.write(b"k")
        writer.close()

    async with server(sink) as target:
        plan = plan_for(target, rtt_ms=2.0, mbps=10.0)
        async with running(plan):

            async def push() -> None:
                reader, writer = await connect(plan)
                writer.write(bytes(total))
                writer.write_eof()
                assert await asyncio.wait_for(reader.read(), 10) == b"k"
                writer.close()
                await writer.wait_closed()

            started = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(push())
                tasks.create_task(push())
            assert time.monotonic() - started >= 2 * total / 1.25e6
            done.set()
    assert done.is_set()


async def test_a_reset_arrives_as_a_reset():
    lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def wait_for_reset(reader, writer):
        try:
            await reader.read()
        except ConnectionError as exc:
            lost.set_result(exc)
        writer.close()

    async with server(wait_for_reset) as target:
        plan = plan_for(target)
        async with running(plan):
            loop = asyncio.get_running_loop()
            sock = socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, parse_address(plan.ports[0].listen))
            await loop.sock_sendall(sock, b"hello")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await asyncio.sleep(0.05)  # let the proxy read: a reset discards unread bytes
            sock.close()
            assert isinstance(await asyncio.wait_for(lost, 5), ConnectionResetError)


async def test_a_target_that_refuses_looks_like_a_reset():
    plan = plan_for(free_port())
    async with running(plan):
        reader, writer = await connect(plan)
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_receiver_that_does_not_read_stops_the_sender():
    release = asyncio.Event()
    received = 0

    async def stubborn(reader, writer):
        nonlocal received
        await release.wait()
        while data := await reader.read(1 << 20):
            received += len(data)
        writer.write(b"done")
        writer.close()

    chunk = bytes(1 << 20)
    async with server(stubborn) as target:
        plan = plan_for(target, rtt_ms=1.0, mbps=10_000.0)
        async with running(plan) as shaper:
            reader, writer = await connect(plan)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < 256:
                    writer.write(chunk)
                    await asyncio.wait_for(writer.drain(), 0.5)
                    sent += 1
            assert sent < 256, "nothing ever pushed back"
            (accepted,) = shaper._open
            bound = accepted.outgoing.direction.line.buffer_bytes
            assert accepted.outgoing.held_bytes <= bound + (1 << 18)  # one read past the bound
            release.set()
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 20) == b"done"
            assert received == (sent + 1) * len(chunk)
            writer.close()
            await writer.wait_closed()


async def test_closed_connections_are_forgotten():
    async with server(echo) as target:
        plan = plan_for(target, rtt_ms=1.0)
        async with running(plan) as shaper:
            for _ in range(20):
                reader, writer = await connect(plan)
                writer.write(b"z")
                writer.write_eof()
                assert await asyncio.wait_for(reader.read(), 5) == b"z"
                writer.close()
                await writer.wait_closed()
            async with asyncio.timeout(5):
                while shaper._open:  # noqa: ASYNC110 - a set tells nobody
                    await asyncio.sleep(0.005)


async def test_figures_change_while_connections_live():
    async with server(echo) as target:
        plan = plan_for(target, rtt_ms=1.0)
        async with running(plan) as shaper:
            reader, writer = await connect(plan)
            writer.write(b"a")
            await asyncio.wait_for(reader.readexactly(1), 5)
            shaper.reconfigure(LinkPlan([EmulatedLink("AMS", "NYC", 80.0, 800.0)], plan.ports))
            started = time.monotonic()
            writer.write(b"b")
            await asyncio.wait_for(reader.readexactly(1), 5)
            assert time.monotonic() - started >= 0.078
            writer.close()
            await writer.wait_closed()


async def test_ports_cannot_change_while_running():
    plan = plan_for(1)
    async with running(plan) as shaper:
        with pytest.raises(ConfigError, match="restart"):
            shaper.reconfigure(LinkPlan(plan.links, []))


async def test_a_taken_port_is_a_clear_refusal():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        plan = LinkPlan(
            [EmulatedLink("A", "B", 1.0, 1.0)], [ShapedPort(listen, "127.0.0.1:9", "A", "B")]
        )
        with pytest.raises(BaseExceptionGroup) as caught:
            await Shaper(plan, random.Random(7)).serve(asyncio.Event())
        assert caught.group_contains(ConfigError, match="cannot listen")
