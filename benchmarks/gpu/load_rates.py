"""A model's way from the drive to a GPU: page-locked reads and copies beside them.

    python benchmarks/gpu/load_rates.py --out build/gpu/load_rates.json

Measured, each as bytes per second: reads of a file of random bytes past the page cache into
page-locked memory by the loader's workers and nothing else; copies of such memory to the device and
nothing else; both as a load does them (``pop_node.store.cuda_arena``). ``share`` = the load's rate
/ the smaller of the other two. What arrives is compared with the file. Digests are left out.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_engine as bench
import numpy as np
import torch

from pop_node.store.cuda_arena import CudaArena

CHUNK_BYTES = 4 << 20
WORKERS = 24
"""As the loader's: ``layout.CHUNK_BYTES`` and ``loader.READERS``, whose modules need more than is
installed on every GPU machine."""

FILE_BYTES = 6 << 30
ROUNDS = 3


def write_file(path: Path, nbytes: int) -> None:
    """Random bytes, on the drive when this returns."""
    rng = np.random.default_rng(bench.SEED)
    with path.open("wb") as file:
        for _ in range(nbytes // CHUNK_BYTES):
            file.write(rng.bytes(CHUNK_BYTES))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
    given = bench.arguments(__doc__)
    if given.dry:
        print("needs page-locked memory: nothing to run without a GPU")
        bench.save(bench.facts(__doc__, dry=True), given.out)
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.out.parent) as folder:
        path = Path(folder) / "weights.bin"
        write_file(path, FILE_BYTES)
        chunks = chunks_of(FILE_BYTES)
        plan: Any = SimpleNamespace(arena_bytes=FILE_BYTES)
        arena = CudaArena(plan, WORKERS, CHUNK_BYTES, device)
        for name, how in (
            ("copy", {"read": False, "place": True}),
            ("read", {"read": True, "place": False}),
            ("load", {"read": True, "place": True}),
        ):
            samples = []
            for _ in range(ROUNDS):
                seconds = bench.seconds_of(lambda how=how: carry(path, arena, chunks, **how), False)
                samples.append(FILE_BYTES / seconds)
            found[name] = {"bytes_s": statistics.median(samples), "samples": samples}
        found["direct"] = carry(path, arena, chunks, read=True, place=True)
        same = all(
            torch.equal(
                arena.memory[chunk.offset : chunk.offset + chunk.nbytes].cpu(),
                torch.from_numpy(np.fromfile(path, np.uint8, CHUNK_BYTES, offset=chunk.offset)),
            )
            for chunk in chunks[:: max(1, len(chunks) // 64)]
        )
    limit = min(found["copy"]["bytes_s"], found["read"]["bytes_s"])
    found |= {"share": found["load"]["bytes_s"] / limit, "same_bytes": same}
    print(found)
    bench.save(bench.facts(__doc__, dry=False) | found, given.out)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
