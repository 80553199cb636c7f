"""Endpoints whose connections, peers or engines go away while KV is on its way."""

from __future__ import annotations

import os

import numpy as np
import pytest

from pop_node.kv_stream import liveness
from tests.pop_node.kv_stream.kv_node import Node, Run, assert_at_rest, cache_of, hand_over
from wire.address import parse_address
from wire.errors import MeshError, OverloadError, PeerError, TransferError
from wire.messages import TransferReport


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
            d.endpoint._intake._server.close()  # nobody finds the other again
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
                d.endpoint._intake._server.close()
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
