"""What a giver answers, to whom, how fast and to how many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.peers import giver
from pop_node.peers.bucket import TokenBucket
from pop_node.peers.inventory import NAME_HEADER, Inventory
from pop_node.store.manifest import Manifest
from pop_node.store.partial import partial_bundle
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from tests.pop_node.peers.peer_mesh import Neighbour, mesh_of
from topology.model import Model

TAKER = {NAME_HEADER: "n2"}


# ---- the rate ----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 0.5)), max_size=50),
    st.floats(1e3, 1e6),
)
def test_no_more_passes_than_the_rate_and_one_burst(
    takes: list[tuple[int, float]], rate: float
) -> None:
    """``takes``: bytes, and seconds since the one before was let through."""
    bucket = TokenBucket(burst_s=0.1)
    now, passed = 0.0, 0
    for nbytes, pause_s in takes:
        now += pause_s
        now += bucket.take(nbytes, now, rate)
        passed += nbytes
        assert passed <= rate * (now + 0.1) * (1 + 1e-9) + 1e-6


def test_takers_share_one_rate_and_a_lower_one_holds_at_once() -> None:
    bucket = TokenBucket(burst_s=0.0)
    assert bucket.take(1000, 0.0, 1000.0) == 1.0
    assert bucket.take(1000, 0.0, 1000.0) == 2.0, "the second taker waits for the first"
    assert bucket.take(1000, 2.0, 500.0) == 2.0
    assert bucket.take(1000, 10.0, 1000.0) == 1.0, "silence is no credit beyond the burst"


async def test_a_serving_node_gives_slower(
    tmp_path: Path, original: Store, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bucket is asked with the share of the rate; nothing here waits for it."""
    rates: set[float] = set()

    def take(self: TokenBucket, nbytes: int, now: float, rate: float) -> float:
        rates.add(rate)
        return 0.0

    monkeypatch.setattr(TokenBucket, "take", take)
    busy = [False]
    node = Neighbour(
        "n1",
        original.root,
        mesh_of(["n1", "n2"], tiny),
        {},
        rate_bytes_per_s=1e6,
        is_busy=lambda: busy[0],
    )
    async with node, aiohttp.ClientSession(headers=TAKER) as session:
        for busy[0] in (False, True):
            await data(session, node, original, 0, 5000)
    assert rates == {1e6, 1e6 * giver.BUSY_SHARE}
    assert node.giver.statistics().given_bytes == 10_000


# ---- answers -----------------------------------------------------------------------------------


@pytest.fixture
async def node(original: Store, tiny: Model) -> AsyncIterator[Neighbour]:
    async with Neighbour("n1", original.root, mesh_of(["n1", "n2"], tiny), {}) as node:
        yield node


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(headers=TAKER) as session:
        yield session


async def data(
    session: aiohttp.ClientSession, node: Neighbour, original: Store, start: int, stop: int
) -> bytes:
    digest = original.get("tiny").manifest.bundle
    url = f"http://{node.address}/bundles/{digest}/weights.bin"
    async with session.get(url, headers={"Range": f"bytes={start}-{stop - 1}"}) as response:
        assert response.status == 206
        assert response.headers["Content-Range"].startswith(f"bytes {start}-{stop - 1}/")
        return await response.read()


async def test_everything_of_a_bundle_can_be_had(
    node: Neighbour, session: aiohttp.ClientSession, original: Store
) -> None:
    bundle = original.get("tiny")
    base = f"http://{node.address}/bundles"
    async with session.get(base) as response:
        inventory = msgspec.json.decode(await response.read(), type=Inventory)
    (stocked,) = inventory.bundles
    assert inventory.node == "n1"
    assert (inventory.wanting, inventory.bringing) == ([], [])
    assert (stocked.bundle, stocked.identity) == (bundle.manifest.bundle, bundle.manifest.identity)
    assert stocked.names == ["tiny"]
    assert stocked.arrived == stocked.chunks == len(bundle.manifest.data.chunks)
    for path in bundle.path.iterdir():
        if path.name == "weights.bin":
            size = path.stat().st_size
            assert await data(session, node, original, 0, size) == path.read_bytes()
            assert await data(session, node, original, 17, 9001) == path.read_bytes()[17:9001]
            continue
        async with session.get(f"{base}/{stocked.bundle}/{path.name}") as response:
            assert await response.read() == path.read_bytes()


@pytest.mark.parametrize(
    ("path", "span", "status"),
    [
        ("{0}/weights.bin", "bytes=0-99999999", 416),
        ("{0}/weights.bin", "bytes=9-3", 416),
        ("{0}/weights.bin", "bytes=0-", 400),
        ("{0}/weights.bin", "", 400),
        ("{0}/other.bin", "", 404),
        ("{0}/..%2f..%2fnames%2ftiny.json", "", 404),
        ("..%2f..%2fnames/tiny.json", "", 404),
        ("1" * 64 + "/manifest.json", "", 404),
        ("1" * 64 + "/arrived", "", 404),
    ],
)
async def test_nothing_else_can_be_had(
    node: Neighbour,
    session: aiohttp.ClientSession,
    original: Store,
    path: str,
    span: str,
    status: int,
) -> None:
    where = path.format(original.get("tiny").manifest.bundle)
    url = aiohttp.client.URL(f"http://{node.address}/bundles/{where}", encoded=True)
    async with session.get(url, headers={"Range": span} if span else {}) as response:
        assert response.status == status


@pytest.mark.parametrize("name", ["", "nobody"])
async def test_strangers_are_refused(node: Neighbour, original: Store, name: str) -> None:
    digest = original.get("tiny").manifest.bundle
    async with aiohttp.ClientSession(headers={NAME_HEADER: name}) as session:
        for path in (
            "",
            f"/{digest}/arrived",
            f"/{digest}/manifest.json",
            f"/{digest}/weights.bin",
        ):
            async with session.get(f"http://{node.address}/bundles{path}") as response:
                assert response.status == 403


async def test_so_many_take_and_the_others_are_told_when_to_come_back(
    tmp_path: Path, original: Store, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giver, "MAX_TAKES", 3)
    monkeypatch.setattr(giver, "TAKES_PER_NODE", 2)
    names = [f"n{number}" for number in range(1, 6)]
    topology = mesh_of(names, tiny)
    digest = original.get("tiny").manifest.bundle
    slow = Neighbour("n1", original.root, topology, {}, rate_bytes_per_s=1.0)
    async with slow, AsyncExitStack() as stack:
        url = f"http://{slow.address}/bundles/{digest}/weights.bin"

        async def ask(name: str) -> aiohttp.ClientResponse:
            session = await stack.enter_async_context(
                aiohttp.ClientSession(headers={NAME_HEADER: name, "Range": "bytes=0-9999"})
            )
            return await stack.enter_async_context(session.get(url))

        taking = [await ask("n2"), await ask("n2")]
        assert [response.status for response in taking] == [206, 206]
        assert (await ask("n2")).status == 503, "no node gets more than its two"
        taking.append(await ask("n3"))
        assert taking[-1].status == 206
        refused = await ask("n4")
        assert refused.status == 503, "there are three already"
        assert int(refused.headers["Retry-After"]) >= 1
        assert slow.giver.statistics().takes == 3
        assert slow.giver.statistics().takers == 2
        assert slow.giver.statistics().turned_away == 2
        taking[0].close()  # a place is free again once that is noticed
        async with asyncio.timeout(10):
            while (await ask("n4")).status == 503:
                pass


async def test_a_bundle_is_held_while_it_is_given(original: Store, tiny: Model) -> None:
    slow = Neighbour("n1", original.root, mesh_of(["n1", "n2"], tiny), {}, rate_bytes_per_s=1.0)
    digest = original.get("tiny").manifest.bundle
    async with slow, aiohttp.ClientSession(headers=TAKER) as session:
        url = f"http://{slow.address}/bundles/{digest}/weights.bin"
        async with session.get(url, headers={"Range": "bytes=0-9999"}) as response:
            assert response.status == 206
            assert original.row("tiny").loaded
            assert original.gc(0).bundles == []


async def test_what_has_arrived_of_a_partial_bundle_is_given_and_no_more(
    tmp_path: Path, original: Store, tiny: Model, session: aiohttp.ClientSession
) -> None:
    bundle = original.get("tiny")
    manifest: Manifest = bundle.manifest
    weights = (bundle.path / "weights.bin").read_bytes()
    store = Store(tmp_path / "half")
    (store.root / "partial").mkdir(parents=True)
    here = {1, 2, 5}
    async with Neighbour("n1", store.root, mesh_of(["n1", "n2"], tiny), {}) as node:
        base = f"http://{node.address}/bundles/{manifest.bundle}"

        async def arrived() -> bytes | None:
            async with session.get(f"{base}/arrived") as response:
                return await response.read() if response.status == 200 else None

        assert await arrived() is None
        with partial_bundle(store.root / "partial", manifest, on_wait=lambda: None) as partial:
            partial.missing_chunks(unwatched)
            for index in here:
                offset, nbytes = manifest.data.span(index)
                assert partial.put_chunk(index, weights[offset : offset + nbytes])
            marks = await arrived()
            assert marks is not None
            assert {index for index, mark in enumerate(marks) if mark} == here
            assert await data(session, node, original, 4096, 3 * 4096) == weights[4096 : 3 * 4096]
            for span in ("bytes=0-8191", "bytes=12287-12288"):
                async with session.get(f"{base}/weights.bin", headers={"Range": span}) as response:
                    assert response.status == 416
        assert await arrived() is None, "nobody fills it any more: its marks may be wrong"
