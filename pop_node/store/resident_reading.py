"""A bundle from the disk into memory with its matrices in the resident form. Needs no torch.

What has more escapes than the form has room for is known only once all of it was there: then it is
read again, as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path

from kernels.native.build import NativeUnavailableError, ensure_library
from kernels.native.resident_parts import PartPacker
from pop_node.store.host_arena import HostArena
from pop_node.store.load_plan import LoadPlan, plan_part
from pop_node.store.loader import crew_for, load_chunks, threads_of
from pop_node.store.partial import published_as
from pop_node.store.reading import READING_THREADS, ReadBundle, read_bundle
from pop_node.store.resident_arena import ResidentArena, ResidentMemory
from pop_node.store.resident_plan import ResidentPlan, plan_resident
from pop_node.store.spare_memory import SpareMemory
from pop_node.store.weight_choice import Shape


def packer_for(form: str, dtype: str) -> PartPacker | None:
    """What packs a model on its way to an engine that keeps ``form`` and computes in ``dtype``.

    None where nothing is to be packed, and without native kernels, which the engine will miss.
    """
    if form != "resident" or dtype != "bfloat16":
        return None
    try:
        return PartPacker(ensure_library())
    except NativeUnavailableError:
        return None


def read_resident(
    directory: Path,
    packer: PartPacker,
    on_reading: Callable[[], None] = lambda: None,
    pool: Executor | None = None,
    spare: SpareMemory | None = None,
    plain: Collection[Shape] = (),
) -> ReadBundle:
    """``read_bundle`` with a ``ResidentMemory`` without misfits; raises as it does. Matrices of
    ``plain`` shapes stay as they are."""

    def arena(plan: LoadPlan, lanes: int, chunk_bytes: int) -> ResidentArena:
        assert isinstance(plan, ResidentPlan)
        return ResidentArena(plan, lanes, chunk_bytes, packer, spare)

    with threads_of(pool, READING_THREADS) as threads:
        read = read_bundle(
            directory, arena, on_reading, threads, plan=partial(plan_resident, plain=plain)
        )
        try:
            return replace(read, memory=_with_misfits(read, read.memory, threads))
        except BaseException:
            read.hold.close()
            raise


def _with_misfits(read: ReadBundle, memory: ResidentMemory, pool: Executor) -> ResidentMemory:
    """``memory`` with the misfits as they are."""
    if not memory.misfits:
        return memory
    entries = [entry for entry in read.manifest.tensors if entry.name in memory.misfits]
    plan = plan_part(read.manifest, entries)
    crew = crew_for(plan)
    data = read.manifest.data
    place = HostArena(plan, crew.arena_lanes(data), data.chunk_bytes)
    directory = published_as(read.directory) or read.directory
    load_chunks(directory, read.manifest, plan, place, crew, pool=pool)
    return replace(memory, placed=(*memory.placed, (plan, place.memory)), misfits=frozenset())
