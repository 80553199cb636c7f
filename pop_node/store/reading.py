"""A bundle from the disk into memory, as bytes: what of a load needs no torch.

An engine does this beside importing torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pop_node.store.bundle import read_texts
from pop_node.store.holding import Hold
from pop_node.store.host_arena import HostArena
from pop_node.store.load_plan import LoadPlan, plan_load
from pop_node.store.loader import WHOLE_CREW, Arena, LoadReport, crew_for, load_chunks, threads_of
from pop_node.store.manifest import MANIFEST_FILE, Manifest, read_manifest
from pop_node.store.partial import is_partial, published_as
from wire.errors import ConfigError

READING_THREADS = WHOLE_CREW.threads + 1
"""Beside the one that reads a bundle: those of a load, one for the texts."""

MakeArena = Callable[[LoadPlan, int, int], Arena]
"""From a plan, the number of lanes and the bytes of a chunk."""

MakePlan = Callable[[Manifest], LoadPlan]


@dataclass(frozen=True, slots=True)
class PlacedBundle:
    """A bundle that is being read: ``texts`` are verified, ``memory`` is where ``plan`` will be,
    and what is in it means nothing before all of it was read."""

    directory: Path
    texts: dict[str, bytes]
    plan: LoadPlan
    memory: Any


@dataclass(frozen=True, slots=True)
class ReadBundle:
    """All of a bundle, verified. ``memory`` is the arena's, as ``plan`` says: [bytes] uint8 of the
    host's, a tensor of a device, ``ResidentMemory`` or ``UnitMemory``; ``hold`` keeps the bundle
    from being collected. ``began`` and ``ended`` are moments of the monotonic clock."""

    directory: Path
    manifest: Manifest
    texts: dict[str, bytes]
    plan: LoadPlan
    memory: Any
    report: LoadReport
    hold: Hold
    began: float
    ended: float


def is_bundle(directory: Path) -> bool:
    """Whether it is a bundle of the store, as opposed to a plain model directory."""
    return (directory / MANIFEST_FILE).exists() or published_as(directory) is not None


def read_bundle(
    directory: Path,
    arena: MakeArena = HostArena,
    on_reading: Callable[[], None] = lambda: None,
    pool: Executor | None = None,
    on_placed: Callable[[PlacedBundle], None] = lambda _: None,
    plan: MakePlan = plan_load,
) -> ReadBundle:
    """Read and verify everything. One that is still arriving is read meanwhile, wherever it goes.

    Args:
        arena: makes the memory that it is read to.
        on_reading: from then on it waits for the drive most of the time, and leaves the
            interpreter to others.
        pool: has ``READING_THREADS`` to spare; else threads are made for it.
        on_placed: called meanwhile by another thread, unless the bundle is still arriving.
        plan: says where in it.

    Raises ``ConfigError`` as ``load_chunks`` does, holding nothing then.
    """
    with threads_of(pool, READING_THREADS) as threads:
        try:
            return _read(directory, arena, on_reading, threads, on_placed, plan)
        except ConfigError:
            published = published_as(directory)
            if published is None:
                raise
        # It was completed just then, which happens only once. The error is forgotten by now, and
        # with it the memory that was read to in vain.
        return _read(published, arena, on_reading, threads, on_placed, plan)


def _read(
    directory: Path,
    arena: MakeArena,
    on_reading: Callable[[], None],
    pool: Executor,
    on_placed: Callable[[PlacedBundle], None],
    make_plan: MakePlan,
) -> ReadBundle:
    began = time.monotonic()
    hold = Hold(directory)
    try:
        manifest = read_manifest(directory)
        plan = make_plan(manifest)
        crew = crew_for(plan)
        place = arena(plan, crew.arena_lanes(manifest.data), manifest.data.chunk_bytes)
        is_reading = threading.Event()

        def reading() -> None:
            on_reading()
            is_reading.set()

        def texts_beside() -> dict[str, bytes]:
            is_reading.wait()  # they are small: what is large begins first
            texts = read_texts(directory, manifest)
            if not is_partial(directory):  # else it may be read anew, to another place
                on_placed(PlacedBundle(directory, texts, plan, place.memory))
            return texts

        reading_texts = pool.submit(texts_beside)
        try:
            report = load_chunks(
                directory, manifest, plan, place, crew, pool=pool, on_reading=reading
            )
        finally:
            is_reading.set()
            wait([reading_texts])
        try:
            texts = reading_texts.result()
        finally:
            del reading_texts  # it has the error, which has this frame, which has the memory
    except BaseException:
        hold.close()
        raise
    ended = time.monotonic()
    memory = place.memory
    return ReadBundle(directory, manifest, texts, plan, memory, report, hold, began, ended)


def read_share(
    directory: Path,
    manifest: Manifest,
    rank: int = 0,
    ranks: int = 1,
    arena: MakeArena = HostArena,
) -> tuple[LoadPlan, Any, LoadReport]:
    """The weights of ``rank`` of ``ranks`` in the memory of an ``arena``; raises as
    ``load_chunks``."""
    plan = plan_load(manifest, rank, ranks)
    crew = crew_for(plan)
    place = arena(plan, crew.arena_lanes(manifest.data), manifest.data.chunk_bytes)
    report = load_chunks(directory, manifest, plan, place, crew)
    return plan, place.memory, report
