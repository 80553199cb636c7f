"""What a drive can do, and making its files and the memory they go to what a benchmark says."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CEILINGS = {f"direct-{threads}": threads for threads in (1, 4, 16)}
BLOCK = 4 * 1024 * 1024
TOUCHES, TOUCHED_S_PER_GBYTE = 6, 0.065


def drop_pages(paths: list[Path]) -> int:
    """Drop the page cache of files; returns how many of their pages are still resident."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident_pages(paths)


def resident_pages(paths: list[Path]) -> int:
    """Pages of files that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    resident = 0
    for path in paths:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            with mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapping:
                pages = -(-size // mmap.PAGESIZE)
                states = (ctypes.c_ubyte * pages)()
                at = ctypes.c_char.from_buffer(mapping)
                address = ctypes.c_void_p(ctypes.addressof(at))
                if libc.mincore(address, ctypes.c_size_t(size), states):
                    raise OSError(ctypes.get_errno(), "mincore")
                resident += sum(state & 1 for state in states)
                del at
    return resident


def resident_share(paths: list[Path]) -> float:
    """Of the pages of files, how many are in the page cache."""
    return resident_pages(paths) / sum(-(-path.stat().st_size // mmap.PAGESIZE) for path in paths)


def read_direct(path: Path, threads: int, *, keep: bool = False) -> Callable[[], Any]:
    from pop_node.store.host_memory import aligned_memory

    buffers = [aligned_memory(BLOCK) for _ in range(threads)]
    for buffer in buffers:
        buffer[:] = 1

    def run() -> Any:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        offsets = iter(range(0, os.fstat(fd).st_size, BLOCK))
        lock = threading.Lock()
        memory = aligned_memory(os.fstat(fd).st_size) if keep else None

        def work(buffer: Any) -> None:
            while True:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                here = buffer if memory is None else memory[offset : offset + BLOCK]
                os.preadv(fd, [here.data], offset)

        workers = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        os.close(fd)
        return [], {}, None

    return run


def touch(nbytes: int) -> float:
    """Use memory and free it until that is cheap, so that what comes next need not be asked for
    from the host; returns the seconds per gigabyte that the last time took."""
    from pop_node.store.host_memory import aligned_memory

    cost = math.inf
    for _ in range(TOUCHES):
        began = time.process_time()
        aligned_memory(nbytes)[::4096] = 1
        cost = (time.process_time() - began) / (nbytes / 1e9)
        if cost < TOUCHED_S_PER_GBYTE:
            break
    return cost
