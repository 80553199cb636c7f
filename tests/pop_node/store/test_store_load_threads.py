"""Whose threads a load uses, and when it says that it reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny_models import tensors, write_huggingface

from pop_node.store import layout
from pop_node.store.host_arena import HostArena
from pop_node.store.load_plan import ChunkPlan, plan_load
from pop_node.store.loader import Crew, load_chunks
from pop_node.store.reading import READING_THREADS, read_bundle
from pop_node.store.store import Bundle, Store
from wire.errors import ConfigError

WAIT_S = 20.0


class Recorded(ThreadPoolExecutor):
    """Keeps what was submitted."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.futures: list[Future[Any]] = []

    def submit(self, call: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        self.futures.append(super().submit(call, *args, **named))
        return self.futures[-1]


@pytest.fixture
def pool() -> Iterator[Recorded]:
    with Recorded(READING_THREADS) as pool:
        yield pool


def test_a_bundle_is_read_by_the_threads_given(bundle: Bundle, pool: Recorded) -> None:
    for number in (1, 2):  # they are there for the next one too
        began = threading.Event()
        read = read_bundle(bundle.path, HostArena, began.set, pool)
        read.hold.close()
        assert began.is_set()
        assert all(future.done() for future in pool.futures)
        names = {entry.name: entry.offset for entry in bundle.manifest.tensors}
        for name, value in tensors().items():
            if name in ("model.norm.weight", "lm_head.weight"):
                at = names[name]
                assert bytes(read.memory[at : at + value.nbytes]) == value.tobytes()
        assert len(pool.futures) > 3 * number
    assert not pool._shutdown


def test_it_says_once_that_it_reads_when_all_readers_are_under_way(
    bundle: Bundle, pool: Recorded
) -> None:
    said: list[list[bool]] = []
    plan = plan_load(bundle.manifest)
    arena = HostArena(plan, Crew(3, 2).lanes, 4096)
    load_chunks(
        bundle.path,
        bundle.manifest,
        plan,
        arena,
        Crew(3, 2),
        pool=pool,
        on_reading=lambda: said.append([f.running() or f.done() for f in pool.futures[:2]]),
    )
    assert said == [[True, True]]  # and the one that says so
    assert len(pool.futures) == Crew(3, 2).threads


def test_nothing_of_a_load_that_failed_goes_on(bundle: Bundle, pool: Recorded) -> None:
    weights = bundle.path / bundle.manifest.data.name
    damaged = bytearray(weights.read_bytes())
    damaged[0] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ConfigError, match="does not match its digest"):
        read_bundle(bundle.path, pool=pool)
    assert pool.futures
    assert all(future.done() for future in pool.futures)


def test_a_bundle_without_its_data_ends_what_waits_for_the_reads(
    bundle: Bundle, pool: Recorded
) -> None:
    (bundle.path / bundle.manifest.data.name).unlink()
    began: list[bool] = []
    with pytest.raises(ConfigError, match=r"cannot be opened"):
        read_bundle(bundle.path, HostArena, lambda: began.append(True), pool)
    assert not began
    assert all(future.done() for future in pool.futures)


def test_reads_go_on_while_a_chunk_is_computed_but_not_far(bundle: Bundle) -> None:
    """Nothing is placed before every lane has a chunk; then no more are under way than lanes."""
    crew, plan = Crew(1, 1), plan_load(bundle.manifest)
    assert len(plan.chunks) > 2 * crew.lanes
    all_lanes_taken = threading.Event()
    under_way: set[int] = set()
    most = 0

    class Slow(HostArena):
        def landing(self, lane: int, chunk: ChunkPlan) -> memoryview:
            nonlocal most
            assert lane not in under_way
            under_way.add(lane)
            most = max(most, len(under_way))
            if most == crew.lanes:
                all_lanes_taken.set()
            return super().landing(lane, chunk)

        def place(self, lane: int, chunk: ChunkPlan) -> int:
            assert all_lanes_taken.wait(WAIT_S)
            under_way.remove(lane)
            return super().place(lane, chunk)

    arena = Slow(plan, crew.lanes, 4096)
    load_chunks(bundle.path, bundle.manifest, plan, arena, crew)
    assert most == crew.lanes == 3
    assert not under_way


def test_packed_chunks_are_decoded_in_a_lane_per_checker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are stored as they are have lanes of their own, read by read."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4 * layout.ALIGNMENT)
    values = tensors()
    for name, value in values.items():
        if ".0." in name:  # noise, which no codec shortens
            bits = np.random.default_rng(0).integers(0, 1 << 16, value.shape, np.uint32) << 16
            values[name] = np.nan_to_num(bits.view(np.float32), nan=1.0)
    store = Store(tmp_path / "store")
    source = write_huggingface(tmp_path / "source", values)
    store.add(str(source), "raw", "bfloat16", lambda *_: None)
    store.pack("raw", target="packed", progress=lambda *_: None)
    packed, crew = store.get("packed"), Crew(3, 2)
    plan, data = plan_load(packed.manifest), packed.manifest.data
    decoded: dict[int, int] = {}
    landed: dict[int, int] = {}

    class Recording(HostArena):
        def decode(self, lane: int, chunk: ChunkPlan, stored: memoryview) -> None:
            decoded[chunk.index] = lane
            super().decode(lane, chunk, stored)

        def landing(self, lane: int, chunk: ChunkPlan) -> memoryview:
            landed[chunk.index] = lane
            return super().landing(lane, chunk)

    arena = Recording(plan, crew.arena_lanes(data), data.chunk_bytes)
    load_chunks(packed.path, packed.manifest, plan, arena, crew)
    coded = {chunk.index for chunk in plan.chunks if data.is_packed(chunk.index)}
    assert coded == decoded.keys() < landed.keys() == {chunk.index for chunk in plan.chunks}
    assert set(decoded.values()) <= set(range(crew.checkers))
    own = {lane for index, lane in landed.items() if index not in coded}
    assert own <= set(range(crew.checkers, crew.arena_lanes(data)))
    all_packed = msgspec.structs.replace(
        data, packing=msgspec.structs.replace(data.packing, ends=[*range(len(data.chunks))])
    )
    assert crew.arena_lanes(all_packed) == crew.checkers
    assert crew.arena_lanes(store.get("raw").manifest.data) == crew.lanes
    raw = read_bundle(store.get("raw").path)
    raw.hold.close()
    assert (arena.memory == raw.memory).all()
