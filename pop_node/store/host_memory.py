"""Memory of this process as the kernel is asked for it: huge pages, touched early, given back."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire.errors import ConfigError

HUGE_PAGE_BYTES = 2 * 1024 * 1024
"""x86-64 and arm64 with 4 KiB pages. First touch of memory in such pages costs a fraction of what
it costs in small ones, and the first touch is most of what a load spends beside the drive."""

_MADV_POPULATE_WRITE = 23  # Linux 5.14, asm-generic/mman-common.h

_LIBC = ctypes.CDLL(None)


def aligned_memory(nbytes: int, *, huge: bool = True) -> NDArray[Any]:
    """[nbytes] uint8 of zeros that begin at a huge page, and take ``huge`` ones when they are first
    touched; raises ``ConfigError`` without room."""
    try:
        mapping = mmap.mmap(
            -1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except OSError as exc:
        raise ConfigError(f"no memory for {nbytes} bytes: {exc}") from exc
    if huge:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    everything = np.frombuffer(mapping, np.uint8)
    start = -everything.ctypes.data % HUGE_PAGE_BYTES
    return everything[start : start + nbytes]


def populate(address: int, nbytes: int) -> bool:
    """Have pages from ``address`` on writable, with what is in them; False where that fails, and
    first use will say why. Through ctypes, which unlike ``mmap`` lets other threads run."""
    return advise(address, nbytes, _MADV_POPULATE_WRITE)


def prefer_huge(address: int, nbytes: int) -> bool:
    """Let what is not touched yet take huge pages; False where there are none."""
    return advise(address, nbytes, mmap.MADV_HUGEPAGE)


def forget(address: int, nbytes: int) -> None:
    """Give the whole pages within these bytes back: nobody may read them any more."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        advise(start, end - start, mmap.MADV_DONTNEED)


def advise(address: int, nbytes: int, advice: int) -> bool:
    """``madvise(2)`` of whole pages; False where it fails."""
    at, length = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
    return bool(_LIBC.madvise(at, length, advice) == 0)
