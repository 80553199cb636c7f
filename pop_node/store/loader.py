"""The way from the drive to where a model is computed: read, verify, decode what is packed, place,
on several threads.

Some threads only read, so that the drive always has the next requests while others compute: a
thread that hashed what it has read kept it waiting, and cost 3 to 5 % (measured). A chunk under way
has a lane from its read until it is placed, and waits in it until a thread checks it, soon enough
to be in the processor's cache. Lanes are few: they bound memory beyond the arena, a buffer of a
chunk in each, of packed bundles two.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from blake3 import blake3

from pop_node.store.arrivals import Arrivals
from pop_node.store.bundle import DAMAGED
from pop_node.store.direct_file import DirectFile
from pop_node.store.host_memory import aligned_memory
from pop_node.store.image import undecodable
from pop_node.store.load_clock import LoadClock, Phase
from pop_node.store.load_plan import ChunkPlan, LoadPlan
from pop_node.store.manifest import DataFile, Manifest
from wire.errors import ConfigError

READERS = 6
"""Threads that read. Measured on a virtual NVMe disk: 4 GiB arrive at 0.97 of its rate with 6 or 8,
0.91 with 4, 0.86 with 12; 256 MiB in 82 ms with 3 to 6, in 85 with 8 or 12, in 89 with 2."""

CHECKERS = min(8, os.cpu_count() or 1)
"""Threads that compute, one for each processor: one hashes 8 GB/s and decodes 9 (measured), so
eight are ahead of any drive."""


class Crew(NamedTuple):
    """Threads of a load."""

    readers: int
    checkers: int

    @property
    def lanes(self) -> int:
        """Chunks under way: one with each thread, and one that waits for each checker."""
        return self.readers + 2 * self.checkers

    def arena_lanes(self, data: DataFile) -> int:
        """Of the arena that ``data`` is loaded to. What is packed waits elsewhere, and each checker
        has a lane to decode to: few, so that they stay in the processor's cache."""
        if data.packing is None:
            return self.lanes
        all_packed = all(map(data.is_packed, range(len(data.chunks))))
        return self.checkers + (0 if all_packed else self.lanes)

    @property
    def threads(self) -> int:
        """With the one that prepares the arena."""
        return self.readers + self.checkers + 1


WHOLE_CREW = Crew(READERS, CHECKERS)


class Arena(Protocol):
    """Memory that a plan's chunks are loaded into. A chunk has a lane to itself: one that is stored
    as it is from when a thread asks for its landing until perhaps another has placed it, a packed
    one while it is decoded."""

    phase: str

    @property
    def memory(self) -> Any:
        """What was loaded, whole once ``finish`` has returned: [bytes] uint8, an array or a tensor,
        and what the arena makes of matrices in the resident form."""

    def prepare(self, stop: threading.Event) -> None:
        """Runs beside the others in a thread of its own; ends soon after ``stop`` is set."""

    def landing(self, lane: int, chunk: ChunkPlan) -> memoryview:
        """Where to read the chunk to: ``chunk.nbytes``, aligned for direct reads."""

    def decode(self, lane: int, chunk: ChunkPlan, stored: memoryview) -> None:
        """Decode the verified bytes of a packed chunk and bring them where they belong. Raises
        ``CodecError``."""

    def place(self, lane: int, chunk: ChunkPlan) -> int:
        """Bring the verified bytes where they belong; returns how many were moved."""

    def finish(self) -> None:
        """Return when all that was placed is there."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a load went; ``direct`` is false where the file system does not read past its cache."""

    wall_s: float
    direct: bool
    phases: dict[str, Phase]


def crew_for(plan: LoadPlan) -> Crew:
    """Threads that suit a load: never more than it has chunks."""
    chunks = max(1, len(plan.chunks))
    return Crew(min(READERS, chunks), min(CHECKERS, chunks))


def threads_of(pool: Executor | None, count: int) -> AbstractContextManager[Executor]:
    """``pool``, or one of ``count`` threads that end with the context."""
    return nullcontext(pool) if pool is not None else ThreadPoolExecutor(count, "load")


def load_chunks(
    directory: Path,
    manifest: Manifest,
    plan: LoadPlan,
    arena: Arena,
    crew: Crew = WHOLE_CREW,
    *,
    pool: Executor | None = None,
    on_reading: Callable[[], None] = lambda: None,
) -> LoadReport:
    """Bring all chunks of ``plan`` into ``arena``, none of them unverified. A packed one is
    verified as it is stored, then decoded straight to its place; the codec checks the result.

    Of a bundle that is still arriving, chunks are loaded as they come, and this returns when its
    tensors were checked too.

    Args:
        arena: has ``crew.arena_lanes(manifest.data)``.
        pool: has ``crew.threads`` to spare; else threads are made for it.
        on_reading: all readers are under way, and leave the interpreter to others most of the time;
            not called where the load does not get as far.

    Raises ``ConfigError`` at the first chunk that cannot be read, does not match its digest or does
    not come; nothing of it goes on and no file is left behind then, and the arena must not be used.
    """
    began = time.monotonic()
    clock = LoadClock()
    arrivals = Arrivals.of(directory, manifest)
    # What has just arrived is in the page cache: a direct read would first write it to the drive.
    direct = arrivals is None
    with arrivals or nullcontext(), DirectFile(directory / manifest.data.name, direct) as file:
        line = _Line(file, manifest, plan, arena, crew, arrivals, clock)
        with threads_of(pool, crew.threads) as threads:
            line.run(threads, on_reading)
        with clock.phase(arena.phase, 0):
            arena.finish()
        if arrivals is not None:
            arrivals.wait_checked()
        return LoadReport(time.monotonic() - began, file.direct, clock.phases())


_Read = tuple[int, ChunkPlan, memoryview]
"""A lane, its chunk, and what is stored of it."""


class _Line:
    """The chunks of a load on their way, each in its lane."""

    def __init__(
        self,
        file: DirectFile,
        manifest: Manifest,
        plan: LoadPlan,
        arena: Arena,
        crew: Crew,
        arrivals: Arrivals | None,
        clock: LoadClock,
    ) -> None:
        self._file, self._data = file, manifest.data
        self._arena, self._crew, self._clock = arena, crew, clock
        self._stop = threading.Event()
        self._todo: Iterator[ChunkPlan] = (
            iter(plan.chunks)
            if arrivals is None
            else arrivals.as_they_come(plan.chunks, self._stop)
        )
        self._drawing = threading.Lock()
        self._arrived = count(1)  # readers (a step of it is atomic)
        self._free: SimpleQueue[int | None] = SimpleQueue()  # lanes, at most all of them
        self._read: SimpleQueue[_Read | None] = SimpleQueue()
        for lane in range(crew.lanes):
            self._free.put(lane)
        longest = self._data.longest_chunk if self._data.packing else 0
        # In huge pages: direct reads into small ones took twice as long.
        self._packed = [aligned_memory(longest).data for _ in range(crew.lanes if longest else 0)]
        self._lanes_to_decode = crew.checkers if longest else 0  # the first ones of the arena

    def run(self, threads: Executor, on_reading: Callable[[], None]) -> None:
        """Return when all is placed; raises what went wrong once nothing goes on."""
        work: list[Callable[[], None]] = [
            *(partial(self._read_chunks, on_reading) for _ in range(self._crew.readers)),
            *(partial(self._check_chunks, lane) for lane in range(self._crew.checkers)),
        ]
        futures: list[Future[None]] = []
        try:
            futures.extend(threads.submit(self._unless_it_fails, part) for part in work)
            futures.append(threads.submit(self._arena.prepare, self._stop))
            wait(futures[: self._crew.readers])
            self._wake_checkers()  # nothing more comes
            while len(futures) > 1:  # one that failed is not kept by the frame that its error has
                futures.pop(0).result()
        finally:
            self._end()
            wait(futures)
        futures.pop().result()

    def _unless_it_fails(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            self._end()  # the others need not finish
            raise

    def _end(self) -> None:
        self._stop.set()
        for _ in range(self._crew.readers):
            self._free.put(None)
        self._wake_checkers()

    def _wake_checkers(self) -> None:
        for _ in range(self._crew.checkers):
            self._read.put(None)

    def _read_chunks(self, on_reading: Callable[[], None]) -> None:
        if next(self._arrived) == self._crew.readers:
            on_reading()
        while (lane := self._free.get()) is not None and not self._stop.is_set():
            with self._drawing:
                chunk = next(self._todo, None)
            if chunk is None:
                return
            offset, nbytes = self._data.span(chunk.index)
            if nbytes < chunk.nbytes:
                view = self._packed[lane][:nbytes]
            else:
                view = self._arena.landing(self._lanes_to_decode + lane, chunk)
            with self._clock.phase("read", nbytes):
                self._file.read(view, offset)
            self._read.put((lane, chunk, view))

    def _check_chunks(self, lane_to_decode: int) -> None:
        while (read := self._read.get()) is not None and not self._stop.is_set():
            lane, chunk, view = read
            self._verify(chunk, view)
            if len(view) < chunk.nbytes:
                with (
                    self._clock.phase("decode", chunk.nbytes),
                    undecodable(chunk.index, self._file.where),
                ):
                    self._arena.decode(lane_to_decode, chunk, view)
            else:
                began = time.monotonic()
                if moved := self._arena.place(self._lanes_to_decode + lane, chunk):
                    self._clock.add(self._arena.phase, began, moved)
            self._free.put(lane)

    def _verify(self, chunk: ChunkPlan, view: memoryview) -> None:
        """``view`` is what is stored of the chunk. Raises ``ConfigError``."""
        offset, nbytes = self._data.span(chunk.index)
        with self._clock.phase("verify", nbytes):
            found = blake3(view).hexdigest()
        if found != self._data.chunks[chunk.index]:
            raise ConfigError(
                f"chunk {chunk.index} (bytes {offset} to {offset + nbytes}) does not match its "
                "digest",
                where=self._file.where,
                suggestion=DAMAGED,
            )
