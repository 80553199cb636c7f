"""A bundle from the disk into memory, as bytes: what of a load needs no torch.

An engine does this beside importing torch.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pop_node.store.bundle import read_texts
from pop_node.store.holding import Hold
from pop_node.store.host_arena import HostArena
from pop_node.store.load_plan import LoadPlan, plan_load
from pop_node.store.loader import READERS, LoadReport, load_chunks
from pop_node.store.manifest import MANIFEST_FILE, Manifest, read_manifest
from pop_node.store.partial import published_as
from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ReadBundle:
    """All of a bundle, verified. ``memory``: [bytes] uint8 as ``plan`` says; ``hold`` keeps the
    bundle from being collected. ``began`` and ``ended`` are moments of the monotonic clock."""

    directory: Path
    manifest: Manifest
    texts: dict[str, bytes]
    plan: LoadPlan
    memory: NDArray[Any]
    report: LoadReport
    hold: Hold
    began: float
    ended: float


def is_bundle(directory: Path) -> bool:
    """Whether it is a bundle of the store, as opposed to a plain model directory."""
    return (directory / MANIFEST_FILE).exists() or published_as(directory) is not None


def read_bundle(directory: Path) -> ReadBundle:
    """Read and verify everything. One that is still arriving is read meanwhile, wherever it goes.

    Raises ``ConfigError`` as ``load_chunks`` does, holding nothing then.
    """
    try:
        return _read(directory)
    except ConfigError:
        published = published_as(directory)
        if published is None:
            raise
        return _read(published)  # it was completed just then; that happens only once


def _read(directory: Path) -> ReadBundle:
    began = time.monotonic()
    hold = Hold(directory)
    try:
        manifest = read_manifest(directory)
        with ThreadPoolExecutor(1) as beside:
            reading_texts = beside.submit(read_texts, directory, manifest)
            plan, memory, report = read_share(directory, manifest)
        texts = reading_texts.result()
    except BaseException:
        hold.close()
        raise
    ended = time.monotonic()
    return ReadBundle(directory, manifest, texts, plan, memory, report, hold, began, ended)


def read_share(
    directory: Path, manifest: Manifest, rank: int = 0, ranks: int = 1
) -> tuple[LoadPlan, NDArray[Any], LoadReport]:
    """The weights of ``rank`` of ``ranks`` in memory of the host; raises as ``load_chunks``."""
    plan = plan_load(manifest, rank, ranks)
    arena = HostArena(plan, READERS, manifest.data.chunk_bytes)
    report = load_chunks(directory, manifest, plan, arena)
    return plan, arena.memory, report
