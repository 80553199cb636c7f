"""Endpoints over real loopback sockets, with real staging memory and a fake engine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from tests.pop_node.kv_stream.kv_node import (
    Authority,
    Node,
    Run,
    assert_at_rest,
    cache_of,
    hand_over,
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
