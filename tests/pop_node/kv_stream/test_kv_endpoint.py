"""Endpoints over real loopback sockets, with real staging memory and a fake engine."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import uvloop
from kv_node import LAYOUT, SPEC, Authority, Node, cache_of

from pop_node.kv_stream import liveness
from pop_node.kv_stream.endpoint import KvEndpoint
from pop_node.kv_stream.frames import MAX_VERSION, Goodbye, Hello, encode
from wire.address import parse_address
from wire.errors import ConfigError, MeshError, OverloadError, PeerError, TransferError
from wire.messages import TransferReport

Run = Callable[[Coroutine[Any, Any, None]], None]
WAIT_S = 20.0


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(main: Coroutine[Any, Any, None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(WAIT_S):
                await main

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(bounded())

    return run


def assert_at_rest(*nodes: Node) -> None:
    for node in nodes:
        s = node.endpoint.statistics()
        assert (s.outgoing_now, s.incoming_now, s.parked_now) == (0, 0, 0)
        assert s.export_slots_held_now == 0
        assert s.import_slots_free_now == LAYOUT.import_slots
        assert sorted(node.free) == list(range(LAYOUT.export_slots))


async def hand_over(p: Node, d: Node, transfer: bytes, tokens: int, have: int = 0) -> None:
    cache = cache_of(tokens, tokens)
    p.send(transfer, d, cache)
    d.receive(transfer, p.name, tokens, cache[:, :, :have] if have else None)
    assert await d.ends[transfer] == [42]
    report = await p.ends[transfer]
    assert isinstance(report, TransferReport)
    assert report.kv_bytes == (tokens - have) * SPEC.token_bytes
    assert report.wire_bytes >= report.kv_bytes
    np.testing.assert_array_equal(
        d.caches[transfer].view(np.uint32), cache.view(np.uint32), strict=True
    )


@pytest.mark.parametrize(("tokens", "have"), [(1, 0), (111, 0), (640, 33), (64, 64)])
def test_bytes_arrive_bit_equal(run: Run, tokens: int, have: int) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            await hand_over(p, d, os.urandom(16), tokens, have)
            assert_at_rest(p, d)
            assert (p.seen, d.seen) == (["d", "d"], ["p", "p"])
            assert p.endpoint.statistics().connections_now == 2
            await hand_over(p, d, os.urandom(16), tokens, have)
            assert p.endpoint.statistics().connections_now == 2

    run(main())


def test_many_transfers_both_ways(run: Run) -> None:
    async def main() -> None:
        async with Node("a") as a, Node("b") as b, Node("c") as c:
            async with asyncio.TaskGroup() as group:
                for n in range(24):
                    p, d = [(a, b), (b, a), (c, a), (b, c)][n % 4]
                    group.create_task(hand_over(p, d, os.urandom(16), 20 + 13 * n))
            assert_at_rest(a, b, c)
            assert {rate.peer for rate in b.endpoint.link_rates()} == {"a", "c"}
            assert all(rate.rtt_ms > 0 for rate in b.endpoint.link_rates())

    run(main())


def test_mutual_tls(run: Run, tmp_path: Path) -> None:
    authority = Authority(tmp_path)

    async def main() -> None:
        async with (
            Node("p", *authority.contexts("p")) as p,
            Node("d", *authority.contexts("d")) as d,
        ):
            await hand_over(p, d, os.urandom(16), 640)
            assert_at_rest(p, d)

    run(main())


@pytest.mark.parametrize("case", ["other name", "other authority", "no certificate", "plain"])
def test_wrong_credentials_are_refused(run: Run, tmp_path: Path, case: str) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path)

    async def main() -> None:
        server, client = authority.contexts("p")
        if case == "other name":
            client = authority.contexts("q")[1]
        elif case == "other authority":
            client.load_cert_chain(other.pem("x"))
        elif case == "no certificate":
            client = type(client)(client.protocol)
            client.load_verify_locations(authority.path)
        dialling = Node("p", server, None if case == "plain" else client)
        async with dialling as p, Node("d", *authority.contexts("d")) as d:
            transfer = os.urandom(16)
            p.send(transfer, d, cache_of(64, 1))
            error = await p.ends[transfer]
            assert isinstance(error, PeerError)
            if case == "other name":
                assert error.code == "identity_mismatch", (error, p.seen, d.seen)
            assert not d.caches
            assert_at_rest(p, d)

    other.contexts("x")
    run(main())


def test_dial_failure_is_a_peer_error(run: Run) -> None:
    async def main() -> None:
        async with Node("p") as p:
            async with Node("d") as d:
                pass
            transfer = os.urandom(16)
            p.send(transfer, d, cache_of(64, 1))
            error = await p.ends[transfer]
            assert isinstance(error, PeerError)
            assert "cannot reach d" in error.message
            async with Node("d") as d:  # a link that failed is dialled again
                await hand_over(p, d, os.urandom(16), 64)
            assert_at_rest(p)

    run(main())


@pytest.mark.parametrize("victim", ["p", "d"])
@pytest.mark.parametrize("stripes", [[0], [1], [0, 1]])
def test_a_cut_connection_costs_only_what_was_on_it(
    run: Run, victim: str, stripes: list[int]
) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            d.imports_held = True
            transfer = os.urandom(16)
            cache = cache_of(640, 1)
            d.receive(transfer, "p", 640, None)
            p.send(transfer, d, cache)
            await d.first_import.wait()
            cut = p.endpoint if victim == "p" else d.endpoint
            connections = cut._connections()
            for stripe in stripes:
                connections[stripe]._transport.abort()
            d.imports_held = False
            d.import_held()
            assert await d.ends[transfer] == [42]
            report = await p.ends[transfer]
            assert isinstance(report, TransferReport)
            assert report.kv_bytes == cache.nbytes
            assert np.array_equal(d.caches[transfer], cache)
            assert p.endpoint.statistics().resumed == 1
            assert_at_rest(p, d)

    run(main())


def test_a_path_that_breaks_again_and_again(run: Run) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            transfer = os.urandom(16)
            cache = cache_of(3000, 1)
            d.receive(transfer, "p", 3000, None)
            p.send(transfer, d, cache)
            for _ in range(4):
                d.first_import.clear()
                await d.first_import.wait()
                for conn in d.endpoint._connections():
                    conn._transport.abort()
            assert await d.ends[transfer] == [42]
            assert isinstance(await p.ends[transfer], TransferReport)
            assert np.array_equal(d.caches[transfer], cache)
            assert p.endpoint.statistics().resumed == 4
            assert_at_rest(p, d)

    run(main())


@pytest.mark.parametrize("victim", ["p", "d"])
def test_killed_peer_frees_the_other(
    run: Run, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "MIN_WAIT_S", 0.3)

    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            d.imports_held = True
            transfer = os.urandom(16)
            d.receive(transfer, "p", 640, None)
            p.send(transfer, d, cache_of(640, 1))
            await d.first_import.wait()
            d.imports_held = False
            d.import_held()
            dead, alive = (p, d) if victim == "p" else (d, p)
            d.endpoint._server.close()  # nobody finds the other again
            for conn in dead.endpoint._connections():
                conn._transport.abort()
            error = await alive.ends[transfer]
            assert isinstance(error, TransferError)
            assert error.code == "transfer_timeout"
            assert isinstance(await dead.ends[transfer], MeshError)
            assert_at_rest(p, d)

    run(main())


@pytest.mark.parametrize("came_back", ["restarted", "with another engine"])
def test_a_decode_node_that_came_back_is_not_the_one_that_left(run: Run, came_back: str) -> None:
    async def main() -> None:
        async with Node("p") as p:
            async with Node("d") as d:
                d.imports_held = True
                transfer = os.urandom(16)
                d.receive(transfer, "p", 640, None)
                p.send(transfer, d, cache_of(640, 1))
                await d.first_import.wait()
                host, port = parse_address(d.address)
                d.endpoint._server.close()
                again = Node("d", incarnation="d-2" if came_back == "restarted" else "d-1")
                await again.endpoint.start(host, port)
                again.address = d.address
                for conn in d.endpoint._connections():
                    conn._transport.abort()
                error = await p.ends[transfer]
                assert (error.code, error.retryable) == ("transfer_failed", True)
                await hand_over(p, again, os.urandom(16), 100)
                await again.__aexit__()
                d.imports_held = False
                d.import_held()
            assert_at_rest(p)

    run(main())


@pytest.mark.parametrize("side", ["p", "d"])
def test_cancel_reaches_the_other_side(run: Run, side: str) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            d.imports_held = True
            transfer = os.urandom(16)
            d.receive(transfer, "p", 640, None)
            p.send(transfer, d, cache_of(640, 1))
            await d.first_import.wait()
            (p if side == "p" else d).endpoint.cancel(transfer, "cancelled", "the client left")
            assert (await p.ends[transfer]).code == (await d.ends[transfer]).code == "cancelled"
            d.imports_held = False
            d.import_held()
            await hand_over(p, d, os.urandom(16), 100)
            assert_at_rest(p, d)

    run(main())


def test_lost_engine_gives_import_slots_back(run: Run) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            d.imports_held = True
            transfer = os.urandom(16)
            d.receive(transfer, "p", 640, None)
            p.send(transfer, d, cache_of(640, 1))
            await d.first_import.wait()
            d.endpoint.engine_lost("m")
            d.imports.clear()
            d.imports_held = False
            assert (await p.ends[transfer]).code == (await d.ends[transfer]).code == "engine_died"
            await hand_over(p, d, os.urandom(16), 100)
            assert_at_rest(p, d)

    run(main())


def test_close_ends_everything(run: Run) -> None:
    async def main() -> None:
        async with Node("p") as p:
            async with Node("d") as d:
                d.imports_held = True
                transfer, idle = os.urandom(16), os.urandom(16)
                d.receive(transfer, "p", 640, None)
                d.receive(idle, "p", 10, None)
                p.send(transfer, d, cache_of(640, 1))
                await d.first_import.wait()
            assert isinstance(await d.ends[transfer], OverloadError)
            assert (await d.ends[idle]).code == "draining"
            assert isinstance(await p.ends[transfer], MeshError)
            assert_at_rest(p)

    run(main())


def test_identity_mismatch_is_said_on_both_sides(run: Run) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            transfer = os.urandom(16)
            d.receive(transfer, "p", 64, None)
            p.send(transfer, d, cache_of(64, 1), identity="other")
            codes = {(await p.ends[transfer]).code, (await d.ends[transfer]).code}
            assert codes == {"identity_mismatch"}

    run(main())


def test_other_mesh_is_refused_with_a_reason(run: Run) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d", mesh="other") as d:
            transfer = os.urandom(16)
            p.send(transfer, d, cache_of(64, 1))
            assert (await p.ends[transfer]).code == "identity_mismatch"

    run(main())


@pytest.mark.parametrize("host", ["a..b", "." + "x" * 70, "no\0name"])
def test_a_name_that_cannot_be_looked_up_costs_one_transfer(run: Run, host: str) -> None:
    async def main() -> None:
        async with Node("p", client_ssl=ssl.create_default_context()) as p, Node("d") as d:
            d.address = f"{host}:7"
            for _ in range(2):  # the endpoint dials on
                transfer = os.urandom(16)
                p.send(transfer, d, cache_of(64, 1))
                assert isinstance(await p.ends[transfer], PeerError)
            assert p.endpoint.link_rates() == []
            assert_at_rest(p)

    run(main())


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "huge header": b"\xff" * 64,
    "future version": encode(Hello(MAX_VERSION + 1, MAX_VERSION + 9, "test", "x", "s", "i", 64)),
    "data first": encode(Goodbye("x", "y"), 10),
    "nothing": b"",
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_disturbs_nobody(run: Run, case: str) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            host, port = d.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(GARBAGE[case])
            if case == "nothing":
                writer.write_eof()
            answer = await reader.read()  # to its end: the connection is closed on us
            assert b"test" in answer  # its Hello, and a reason
            writer.close()
            await hand_over(p, d, os.urandom(16), 64)
            assert_at_rest(p, d)

    run(main())


def test_silent_stranger_is_shown_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "MIN_WAIT_S", 0.05)
    wakes = 0
    tick = KvEndpoint._on_timer

    def counted(self: KvEndpoint) -> None:
        nonlocal wakes
        wakes += 1
        tick(self)

    monkeypatch.setattr(KvEndpoint, "_on_timer", counted)

    async def main() -> None:
        async with Node("d") as d:
            host, port = d.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            assert b"gone silent" in await reader.read()
            writer.close()
            assert wakes < 10  # one timer, no spinning

    run(main())


def test_listener_off_loopback_needs_tls(run: Run) -> None:
    async def main() -> None:
        node = Node("p")
        with pytest.raises(ConfigError, match="needs TLS"):
            await node.endpoint.start("0.0.0.0", 0)
        node.staging.close()

    run(main())


def test_nothing_leaks_descriptors(run: Run) -> None:
    async def main() -> None:
        process = psutil.Process()
        async with Node("p") as p, Node("d") as d:  # the loop opens what it needs
            await hand_over(p, d, os.urandom(16), 10)
        before = process.num_fds()
        async with Node("p") as p, Node("d") as d:
            await hand_over(p, d, os.urandom(16), 10)
            for n in range(20):
                transfer = os.urandom(16)
                d.receive(transfer, "p", 200, None)
                p.send(transfer, d, cache_of(200, n))
                if n % 3 == 0:
                    await asyncio.sleep(0)
                    (p, d)[n % 2].endpoint.cancel(transfer, "cancelled", "")
                await p.ends[transfer]
                await d.ends[transfer]
            await hand_over(p, d, os.urandom(16), 10)
            assert_at_rest(p, d)
        assert process.num_fds() == before

    run(main())
