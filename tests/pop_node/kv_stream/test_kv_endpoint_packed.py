"""Endpoints over loopback sockets that pack what they send, with the real codec."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from kernels import codec
from pop_node.kv_stream import codec_threads
from pop_node.kv_stream.frames import CODEC_PACKED
from pop_node.kv_stream.packing import PackingRule
from tests.pop_node.kv_stream.kv_node import Node, Run, assert_at_rest, cache_of
from wire.errors import MeshError
from wire.messages import TransferReport

TOKENS = 640


@pytest.fixture(autouse=True)
def always_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback is too fast for the rule to pack anything."""
    monkeypatch.setattr(PackingRule, "wants", lambda *_: True)


@asynccontextmanager
async def nodes(*, knows_packing: bool = True) -> AsyncIterator[tuple[Node, Node]]:
    """Two nodes whose KV is float16, once their codecs are loaded."""
    async with Node("p", dtype="float16") as p, Node("d", dtype="float16") as d:
        await asyncio.gather(*(n.endpoint.codec.wait_loaded() for n in (p, d)))
        if not knows_packing:
            d.endpoint.codec.codecs = d.endpoint.codec.codecs[1:]
        yield p, d
    assert_at_rest(p, d)  # they waited for their threads


def begin(p: Node, d: Node, tokens: int = TOKENS) -> tuple[bytes, np.ndarray]:
    transfer, cache = os.urandom(16), cache_of(tokens, tokens).astype(np.float16)
    p.send(transfer, d, cache)
    d.receive(transfer, p.name, tokens, None)
    return transfer, cache


@pytest.mark.parametrize("tokens", [1, 31, TOKENS])
def test_packed_bytes_arrive_bit_equal(run: Run, tokens: int) -> None:
    async def main() -> None:
        async with nodes() as (p, d):
            transfer, cache = begin(p, d, tokens)
            assert await d.ends[transfer] == [42]
            report = await p.ends[transfer]
            assert isinstance(report, TransferReport)
            np.testing.assert_array_equal(
                d.caches[transfer].view(np.uint16), cache.view(np.uint16), strict=True
            )
            sent, got = p.endpoint.statistics(), d.endpoint.statistics()
            assert sent.packed_pieces == got.unpacked_pieces
            assert sent.sent_bytes == got.received_bytes == report.kv_bytes == cache.nbytes
            if tokens == TOKENS:
                assert sent.packed_pieces > sent.raw_pieces == 0
                assert report.wire_bytes < 0.95 * report.kv_bytes
            if tokens == 1:
                assert sent.packed_pieces == 0, "a block of so few bytes is longer than they are"

    run(main())


def test_node_that_knows_no_packing_gets_raw_pieces(run: Run) -> None:
    async def main() -> None:
        async with nodes(knows_packing=False) as (p, d):
            for a, b in ((p, d), (d, p)):
                transfer, _ = begin(a, b)
                assert await b.ends[transfer] == [42]
                await a.ends[transfer]
                assert a.endpoint.statistics().packed_pieces == 0

    run(main())


def test_block_of_garbage_ends_the_transfer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def garbage(payload: memoryview, dtype: str) -> bytes:
        return os.urandom(len(payload) // 2)

    async def main() -> None:
        async with nodes() as (p, d):
            monkeypatch.setattr(codec, "encode", garbage)
            transfer, _ = begin(p, d)
            for node in (p, d):
                error = await node.ends[transfer]
                assert isinstance(error, MeshError)
                assert error.code == "checksum_mismatch"
            assert d.endpoint.statistics().bad_checksums == 1

    run(main())


@pytest.mark.parametrize(("at", "end"), [("p", "cancel"), ("p", "peer gone"), ("d", "cancel")])
def test_end_while_the_codec_works(
    run: Run, monkeypatch: pytest.MonkeyPatch, at: str, end: str
) -> None:
    """Slots are given back only when no thread works in them any more."""
    name = "_packed" if at == "p" else "_unpacked"
    honest = getattr(codec_threads, name)

    async def main() -> None:
        loop, begun, may_end = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

        def slow(*args):
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(may_end.wait(), loop).result()
            return honest(*args)

        monkeypatch.setattr(codec_threads, name, slow)
        async with nodes() as (p, d):
            transfer, _ = begin(p, d)
            await begun.wait()
            if end == "cancel":
                p.endpoint.cancel(transfer, "cancelled", "")
            else:
                await d.endpoint.close()
            await asyncio.gather(p.ends[transfer], d.ends[transfer])
            held = p.endpoint.statistics().export_slots_held_now
            used = d.endpoint.statistics().import_slots_used_now
            assert (held if at == "p" else used) > 0
            may_end.set()

    run(main())


def test_offer_is_raw_alone_where_there_is_no_codec_in_c(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "is_native", lambda: False)

    async def main() -> None:
        async with nodes() as (p, d):
            assert CODEC_PACKED not in p.endpoint.codec.codecs
            transfer, _ = begin(p, d)
            assert await d.ends[transfer] == [42]
            await p.ends[transfer]

    run(main())
