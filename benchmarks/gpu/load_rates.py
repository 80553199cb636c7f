"""A model's way from the drive to a GPU: page-locked reads and copies beside them.

    python benchmarks/gpu/load_rates.py --out build/gpu/load_rates.json

Measured, each as bytes per second: reads of a file of random bytes past the page cache into
page-locked memory by as many threads as a load has lanes; copies of such memory to the device and
nothing else; both as a load does them (``pop_node.store.cuda_arena``). ``share`` = the load's rate
/ the smaller of the other two. What arrives is compared with the file. Digests are left out. The
file is as long as the drive can write in ``WRITE_S``.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from running import Report, arguments, seconds_of

from pop_node.store.cuda_arena import CudaArena

CHUNK_BYTES = 4 << 20
WORKERS = 22
"""``layout.CHUNK_BYTES``, and lanes of a load with eight checkers (``loader.Crew``), whose modules
need more than is installed on every GPU machine."""

MOST_BYTES = 2 << 30
WRITE_S = 5.0
STRETCH_CHUNKS = 16
"""Between looks at the clock, each on the drive then."""

ROUNDS = 3
SEED = 20240607


def write_file(path: Path) -> int:
    """Random bytes that differ from chunk to chunk, on the drive when this returns; how many."""
    rng = np.random.default_rng(SEED)
    drawn = [bytearray(rng.bytes(CHUNK_BYTES)) for _ in range(STRETCH_CHUNKS)]
    until, written = time.monotonic() + WRITE_S, 0
    with path.open("wb") as file:
        while written < MOST_BYTES and (written == 0 or time.monotonic() < until):
            for chunk in drawn:
                chunk[:8] = written.to_bytes(8, "little")
                written += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return written


def chunks_of(nbytes: int) -> list[Any]:
    """Like ``load_plan.ChunkPlan``: each chunk goes to its own place, as it is."""
    return [
        SimpleNamespace(
            offset=offset,
            nbytes=CHUNK_BYTES,
            moves=(
                SimpleNamespace(
                    source=0, target=offset, rows=1, width=CHUNK_BYTES, stride=CHUNK_BYTES
                ),
            ),
        )
        for offset in range(0, nbytes, CHUNK_BYTES)
    ]


def carry(path: Path, arena: CudaArena, chunks: list[Any], *, read: bool, place: bool) -> bool:
    """Take all chunks through the arena; whether reads went past the page cache."""
    direct = True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        direct, fd = False, os.open(path, os.O_RDONLY)
    todo, drawing = iter(chunks), threading.Lock()

    def work(worker: int) -> None:
        while True:
            with drawing:
                chunk = next(todo, None)
            if chunk is None:
                return
            view = arena.landing(worker, chunk)
            if read and os.preadv(fd, [view], chunk.offset) != chunk.nbytes:
                raise OSError("the file is cut short")
            if place:
                arena.place(worker, chunk)

    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            for future in [pool.submit(work, worker) for worker in range(WORKERS)]:
                future.result()
        arena.finish()
    finally:
        os.close(fd)
    return direct


def main() -> int:
    given = arguments(__doc__)
    report = Report(__doc__, given)
    if given.dry:
        print("needs page-locked memory: nothing to run without a GPU")
        return report.ended()
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory(dir=given.out.parent) as folder:
        path = Path(folder) / "weights.bin"
        nbytes = write_file(path)
        chunks = chunks_of(nbytes)
        plan: Any = SimpleNamespace(arena_bytes=nbytes)
        arena = CudaArena(plan, WORKERS, CHUNK_BYTES, device)
        report.note(file_bytes=nbytes)

        def rates(read: bool, place: bool) -> dict[str, Any]:
            direct: list[bool] = []

            def run() -> None:
                direct.append(carry(path, arena, chunks, read=read, place=place))

            samples = [nbytes / seconds_of(run, dry=False) for _ in range(ROUNDS)]
            return {"bytes_s": statistics.median(samples), "samples": samples, "direct": direct[0]}

        def same() -> dict[str, Any]:
            arena.memory.zero_()
            torch.cuda.synchronize()
            carry(path, arena, chunks, read=True, place=True)
            looked = chunks[:: max(1, len(chunks) // 64)]
            wrong = [chunk.offset for chunk in looked if not arrived(path, arena, chunk)]
            return {"right": not wrong, "wrong_offsets": wrong[:8]}

        report.add({"same": True}, same)
        copy = report.add({"way": "copy"}, lambda: rates(False, True), needs_s=3.0)
        read = report.add({"way": "read"}, lambda: rates(True, False), needs_s=3.0)
        load = report.add({"way": "load"}, lambda: rates(True, True), needs_s=3.0)
        if all("bytes_s" in row for row in (copy, read, load)):
            report.note(share=load["bytes_s"] / min(copy["bytes_s"], read["bytes_s"]))
    return report.ended()


def arrived(path: Path, arena: CudaArena, chunk: Any) -> bool:
    """Whether a chunk is on the device as it is in the file."""
    there = arena.memory[chunk.offset : chunk.offset + chunk.nbytes].cpu()
    stored = np.fromfile(path, np.uint8, chunk.nbytes, offset=chunk.offset)
    return torch.equal(there, torch.from_numpy(stored))


if __name__ == "__main__":
    sys.exit(main())
