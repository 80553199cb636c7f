"""Bundles from peers and origins over real sockets on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import signal
import sys
import threading
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kernels.ops import load_ops
from pop_node.models.registry import load_model
from pop_node.peers import client, giver
from pop_node.peers.bring import Bringing
from pop_node.store.store import Store
from registry.entries import ServiceEntry
from tests.pop_node.peers.peer_mesh import Neighbour, mesh_of, same
from topology.model import Model
from wire.errors import ConfigError


async def test_a_bundle_comes_from_the_peer_that_has_it(
    tmp_path: Path, original: Store, tiny: Model
) -> None:
    topology = mesh_of(["n1", "n2"], tiny)
    registry: dict[str, ServiceEntry] = {}
    seen: list[Bringing] = []
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(Neighbour("n1", original.root, topology, registry))
        taker = Neighbour("n2", tmp_path / "here", topology, registry)
        await stack.enter_async_context(taker)
        manifest = await taker.bringer.bring("tiny", seen.append)
        assert manifest.identity == tiny.digest
        same(taker.store, original)
        assert await taker.bringer.bring("tiny") == manifest
    assert seen[-1].phase == "done"
    assert seen[-1].sources == {"n1": manifest.data.nbytes}
    assert taker.store.row("tiny").entry.source == "mesh:test"


async def test_without_peers_and_source_the_reason_is_said(tmp_path: Path, tiny: Model) -> None:
    topology = mesh_of(["n1"], tiny)
    async with Neighbour("n1", tmp_path / "here", topology, {}) as node:
        with pytest.raises(ConfigError, match=r"no node gives tiny.*names no source"):
            await node.bringer.bring("tiny")


async def test_a_model_that_is_there_is_not_asked_for(original: Store, tiny: Model) -> None:
    async with Neighbour("n1", original.root, mesh_of(["n1"], tiny), {}) as node:
        assert (await node.bringer.bring("tiny")).identity == tiny.digest
    other = dataclasses.replace(tiny, digest="0" * 64)
    async with Neighbour("n1", original.root, mesh_of(["n1"], other), {}) as node:
        with pytest.raises(ConfigError, match="asked for is 0000"):
            await node.bringer.bring("tiny")


async def test_several_peers_give_at_once(tmp_path: Path, original: Store, tiny: Model) -> None:
    names = ["n1", "n2", "n3", "n4"]
    topology, registry = mesh_of(names, tiny), dict[str, ServiceEntry]()
    seen: list[Bringing] = []
    async with AsyncExitStack() as stack:
        for name in names[:3]:
            one = Neighbour(name, original.root, topology, registry, rate_bytes_per_s=50_000)
            await stack.enter_async_context(one)
        taker = await stack.enter_async_context(
            Neighbour("n4", tmp_path / "here", topology, registry)
        )
        await taker.bringer.bring("tiny", seen.append)
        same(taker.store, original)
    assert set(seen[-1].sources) == {"n1", "n2", "n3"}


async def test_an_unpinned_model_is_known_by_its_name_and_dtype(
    tmp_path: Path, original: Store, tiny: Model
) -> None:
    for model, there in (
        (Model("tiny", dtype="float32"), True),
        (Model("tiny", dtype="bfloat16"), False),
        (Model("other", dtype="float32"), False),
    ):
        topology, registry = mesh_of(["n1", "n2"], model), dict[str, ServiceEntry]()
        async with (
            Neighbour("n1", original.root, topology, registry),
            Neighbour("n2", tmp_path / f"{there}{model.name}", topology, registry) as taker,
        ):
            if there:
                await taker.bringer.bring(model.name)
                same(taker.store, original)
            else:
                with pytest.raises(ConfigError, match="no node gives"):
                    await taker.bringer.bring(model.name)


async def test_ten_nodes_that_start_together_do_not_stampede_the_one_that_has_it(
    tmp_path: Path, original: Store, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(giver, "MAX_TAKES", 4)
    monkeypatch.setattr(client, "STALL_S", 20.0)  # eleven nodes share this process
    names = [f"n{number:02}" for number in range(11)]
    topology, registry = mesh_of(names, tiny), dict[str, ServiceEntry]()
    last: dict[str, Bringing] = {}
    async with AsyncExitStack() as stack:
        one = Neighbour("n00", original.root, topology, registry, rate_bytes_per_s=500_000)
        await stack.enter_async_context(one)
        takers = [
            await stack.enter_async_context(Neighbour(name, tmp_path / name, topology, registry))
            for name in names[1:]
        ]
        async with asyncio.TaskGroup() as group:
            for taker in takers:
                note = partial(last.__setitem__, taker.name)
                group.create_task(taker.bringer.bring("tiny", note))
        for taker in takers:
            same(taker.store, original)
        nbytes = original.get("tiny").manifest.data.nbytes
        from_one = one.giver.statistics().given_bytes
        assert one.giver.statistics().takes == 0
    assert from_one < 8 * nbytes, "the takers gave to each other what they had"
    others = sum(sum(b.sources.values()) - b.sources.get("n00", 0) for b in last.values())
    assert others > 2 * nbytes


async def test_who_is_cancelled_stops_soon_and_keeps_what_it_has(
    tmp_path: Path, original: Store, tiny: Model
) -> None:
    topology, registry = mesh_of(["n1", "n2"], tiny), dict[str, ServiceEntry]()
    nbytes = original.get("tiny").manifest.data.nbytes
    begun = asyncio.Event()
    slow = Neighbour("n1", original.root, topology, registry, rate_bytes_per_s=20_000)
    taker = Neighbour("n2", tmp_path / "here", topology, registry)
    seen: list[Bringing] = []

    def note(bringing: Bringing) -> None:
        seen.append(bringing)
        if bringing.sources:
            begun.set()

    async with slow, taker:
        bringing = asyncio.create_task(taker.bringer.bring("tiny", note))
        async with asyncio.timeout(20):
            await begun.wait()
        bringing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bringing
        assert taker.bringer.wanted() == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bring-n1")]
    assert taker.store.rows() == []
    async with (
        Neighbour("n1", original.root, topology, registry),
        Neighbour("n2", tmp_path / "here", topology, registry) as taker,
    ):
        await taker.bringer.bring("tiny", seen.append)
        same(taker.store, original)
    assert sum(seen[-1].sources.values()) < nbytes


async def test_a_model_can_be_loaded_while_it_is_brought(
    tmp_path: Path, original: Store, tiny: Model
) -> None:
    topology, registry = mesh_of(["n1", "n2"], tiny), dict[str, ServiceEntry]()
    slow = Neighbour("n1", original.root, topology, registry, rate_bytes_per_s=100_000)
    taker = Neighbour("n2", tmp_path / "here", topology, registry)
    begun = asyncio.Event()

    def note(bringing: Bringing) -> None:
        if bringing.sources:
            begun.set()

    async with slow, taker, asyncio.TaskGroup() as group:
        assert taker.bringer.arriving("tiny") is None
        bringing = group.create_task(taker.bringer.bring("tiny", note))
        async with asyncio.timeout(20):
            await begun.wait()
        bundle = taker.bringer.arriving("tiny")
        assert bundle is not None
        assert not bringing.done()
        await asyncio.to_thread(load_model, bundle.path, "float32", load_ops("reference", 1))
        await bringing
    assert taker.bringer.arriving("tiny") is None


FULL = r"cannot be changed.*No space left on device: 0\.00 GB are needed, \d+\.\d\d GB are free"


async def test_a_full_disk_is_said_before_anything_travels(
    tmp_path: Path, original: Store, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    topology, registry = mesh_of(["n1", "n2"], tiny), dict[str, ServiceEntry]()
    async with (
        Neighbour("n1", original.root, topology, registry) as one,
        Neighbour("n2", tmp_path / "here", topology, registry) as taker,
    ):
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ConfigError, match=FULL):
            await taker.bringer.bring("tiny")
        assert one.giver.statistics().given_bytes == 0
        monkeypatch.undo()
        await taker.bringer.bring("tiny")
        same(taker.store, original)


@pytest.mark.parametrize("whose", ["giver", "taker"])
async def test_a_disk_that_cannot_be_looked_at_ends_it_with_the_reason(
    tmp_path: Path, original: Store, tiny: Model, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    here = tmp_path / "here"
    broken = (here if whose == "taker" else original.root) / "partial"
    broken.mkdir(parents=True, exist_ok=True)
    real = os.listdir

    def failing(path: Any) -> list[Any]:
        if path == broken:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    said = "Input/output error" if whose == "taker" else "no node gives tiny"
    topology, registry = mesh_of(["n1", "n2"], tiny), dict[str, ServiceEntry]()
    async with (
        Neighbour("n1", original.root, topology, registry),
        Neighbour("n2", here, topology, registry) as taker,
    ):
        monkeypatch.setattr(os, "listdir", failing)
        with pytest.raises(ConfigError, match=said):
            await taker.bringer.bring("tiny")
        monkeypatch.undo()
        await taker.bringer.bring("tiny")
        same(taker.store, original)


async def test_a_disk_that_fails_in_the_middle_ends_it_with_the_reason(
    tmp_path: Path, original: Store, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.pwrite, [40]

    def failing(fd: int, data: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, data, offset)

    topology, registry = mesh_of(["n1", "n2"], tiny), dict[str, ServiceEntry]()
    async with (
        Neighbour("n1", original.root, topology, registry),
        Neighbour("n2", tmp_path / "here", topology, registry) as taker,
    ):
        monkeypatch.setattr(os, "pwrite", failing)
        with pytest.raises(ConfigError, match=r"cannot be changed.*Input/output"):
            await taker.bringer.bring("tiny")
        monkeypatch.undo()
        await taker.bringer.bring("tiny")
        same(taker.store, original)


async def test_a_node_that_is_killed_goes_on_where_it_was(
    tmp_path: Path, original: Store, tiny: Model
) -> None:
    topology, registry = mesh_of(["n1", "n2"], tiny), dict[str, ServiceEntry]()
    nbytes = original.get("tiny").manifest.data.nbytes
    here = tmp_path / "here"
    slow = Neighbour("n1", original.root, topology, registry, rate_bytes_per_s=nbytes / 4)
    async with slow:
        taker = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.pop_node.peers.taker_process", str(here), slow.address),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )
        assert taker.stdout is not None
        async with asyncio.timeout(60):
            arrived = int(await taker.stdout.readline())
            taker.kill()
            assert await taker.wait() == -signal.SIGKILL
    assert 0 < arrived < nbytes
    assert Store(here).rows() == []
    seen: list[Bringing] = []
    async with (
        Neighbour("n1", original.root, topology, registry),
        Neighbour("n2", here, topology, registry) as again,
    ):
        await again.bringer.bring("tiny", seen.append)
        same(again.store, original)
    assert sum(seen[-1].sources.values()) <= nbytes - arrived
