"""The way from the drive to where a model is computed: read, verify, decode what is packed, place,
on several threads.

Each worker takes the next chunk and carries it through all steps, so that some always wait for the
drive while others compute, a chunk is hashed while it is in the processor's cache, and no queue
lies between the steps. At most one chunk per worker is under way: memory beyond the arena is
bounded by ``READERS`` buffers, of packed bundles by twice as many.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from pop_node.store.arrivals import Arrivals
from pop_node.store.direct_file import DirectFile
from pop_node.store.host_memory import aligned_memory
from pop_node.store.image import decode_chunk
from pop_node.store.load_plan import ChunkPlan, LoadPlan
from pop_node.store.manifest import DataFile, Manifest
from wire.errors import ConfigError

READERS = 24
"""Workers. Measured: a virtual NVMe disk reaches its rate with 1 to 16 reads in flight; the rest
covers for workers that hash, and for a machine whose processors are busy with something else (24
load 5 % faster than 16 on one that is, and as fast on a quiet one)."""

CHUNKS_PER_READER = 5
"""At least: the first reads of all end at about the same time, and until then nobody hashes.
Measured: 65 chunks in 92 ms by 12 readers, in 105 ms by 24."""


class Arena(Protocol):
    """Memory that a plan's chunks are loaded into; each worker has a number below ``workers``."""

    phase: str

    @property
    def memory(self) -> Any:
        """[bytes] uint8, an array or a tensor; whole once ``finish`` has returned."""

    def prepare(self, stop: threading.Event) -> None:
        """Runs beside the workers in a thread of its own; ends soon after ``stop`` is set."""

    def landing(self, worker: int, chunk: ChunkPlan) -> memoryview:
        """Where to read or decode the chunk to: ``chunk.nbytes``, aligned for direct reads."""

    def place(self, worker: int, chunk: ChunkPlan) -> int:
        """Bring the verified bytes where they belong; returns how many were moved."""

    def finish(self) -> None:
        """Return when all that was placed is there."""


@dataclass(frozen=True, slots=True)
class Phase:
    """``wall_s``: while at least one worker was at it (phases overlap); ``nbytes`` went through.

    ``began`` and ``ended`` are moments of the monotonic clock.
    """

    wall_s: float
    nbytes: int
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a load went; ``direct`` is false where the file system does not read past its cache."""

    wall_s: float
    direct: bool
    phases: dict[str, Phase]


def readers(plan: LoadPlan) -> int:
    """How many workers suit a load."""
    return min(READERS, max(1, len(plan.chunks) // CHUNKS_PER_READER))


def threads_of(pool: Executor | None, count: int) -> AbstractContextManager[Executor]:
    """``pool``, or one of ``count`` threads that end with the context."""
    return nullcontext(pool) if pool is not None else ThreadPoolExecutor(count, "load")


def load_chunks(
    directory: Path,
    manifest: Manifest,
    plan: LoadPlan,
    arena: Arena,
    workers: int = READERS,
    *,
    pool: Executor | None = None,
    on_reading: Callable[[], None] = lambda: None,
) -> LoadReport:
    """Bring all chunks of ``plan`` into ``arena``, none of them unverified. A packed one is
    verified as it is stored, then decoded straight to its place; the codec checks the result.

    Of a bundle that is still arriving, chunks are loaded as they come, and this returns when its
    tensors were checked too.

    Args:
        pool: has ``workers + 1`` threads to spare; else threads are made for it.
        on_reading: all workers are under way, and leave the interpreter to others most of the time;
            not called where the load does not get as far.

    Raises ``ConfigError`` at the first chunk that cannot be read, does not match its digest or does
    not come; nothing of it goes on and no file is left behind then, and the arena must not be used.
    """
    began = time.monotonic()
    clock = _Clock()
    drawing = threading.Lock()
    stop = threading.Event()
    arrivals = Arrivals.of(directory, manifest)
    data = manifest.data
    longest = data.longest_chunk if data.packing else 0
    # In huge pages: direct reads into small ones took twice as long.
    packed = [aligned_memory(longest).data for _ in range(workers if longest else 0)]
    todo = iter(plan.chunks) if arrivals is None else arrivals.as_they_come(plan.chunks, stop)

    def work(worker: int) -> None:
        if worker == workers - 1:
            on_reading()
        try:
            while not stop.is_set():
                with drawing:
                    chunk = next(todo, None)
                if chunk is None:
                    return
                buffer = packed[worker] if packed else None
                _carry(chunk, worker, file, data, buffer, arena, clock)
        except BaseException:
            stop.set()  # the others need not finish
            raise

    # What has just arrived is in the page cache: a direct read would first write it to the drive.
    direct = arrivals is None
    with arrivals or nullcontext(), DirectFile(directory / data.name, direct) as file:
        with threads_of(pool, workers + 1) as threads:
            futures = [threads.submit(work, worker) for worker in range(workers)]
            futures.append(threads.submit(arena.prepare, stop))
            try:
                for future in futures:
                    future.result()
            finally:
                stop.set()
                wait(futures)
        with clock.phase(arena.phase, 0):
            arena.finish()
        if arrivals is not None:
            arrivals.wait_checked()
        return LoadReport(time.monotonic() - began, file.direct, clock.phases())


def _carry(
    chunk: ChunkPlan,
    worker: int,
    file: DirectFile,
    data: DataFile,
    packed: memoryview | None,
    arena: Arena,
    clock: _Clock,
) -> None:
    """``packed``: the worker's buffer for what is stored of a chunk; None if nothing is packed."""
    landing = arena.landing(worker, chunk)
    offset, nbytes = data.span(chunk.index)
    view = landing if packed is None or nbytes == chunk.nbytes else packed[:nbytes]
    with clock.phase("read", nbytes):
        file.read(view, offset)
    with clock.phase("verify", nbytes):
        found = blake3(view).hexdigest()
    if found != data.chunks[chunk.index]:
        raise ConfigError(
            f"chunk {chunk.index} (bytes {offset} to {offset + nbytes}) does not match its digest",
            where=file.where,
            suggestion="the disk or the copy is damaged: remove the model and add it again",
        )
    if view is not landing:
        with clock.phase("decode", chunk.nbytes):
            decode_chunk(view, landing, chunk.index, file.where)
    began = time.monotonic()
    if moved := arena.place(worker, chunk):
        clock.add(arena.phase, began, moved)


class _Clock:
    """Collects when each worker was in which phase (appending to a list is atomic)."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, float, float, int]] = []

    def add(self, phase: str, began: float, nbytes: int) -> None:
        self._spans.append((phase, began, time.monotonic(), nbytes))

    @contextmanager
    def phase(self, name: str, nbytes: int) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.add(name, began, nbytes)

    def phases(self) -> dict[str, Phase]:
        found = {}
        for name in ("read", "verify", "decode", "to_device"):
            spans = sorted(span[1:] for span in self._spans if span[0] == name)
            total = sum(nbytes for _, _, nbytes in spans)
            if total:
                wall_s = covered([(began, ended) for began, ended, _ in spans])
                ended = max(ended for _, ended, _ in spans)
                found[name] = Phase(wall_s, total, spans[0][0], ended)
        return found


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their beginning."""
    total, until = 0.0, float("-inf")
    for began, ended in spans:
        if ended > until:
            total += ended - max(began, until)
            until = ended
    return total
