"""Memory for a model that is not known yet, touched before there is one.

What is touched for the first time costs more than reading the model where a hypervisor has taken
back memory that nobody used for seconds (measured: 1.2 to 7 s/GB, against 0.05 s/GB).
"""

from __future__ import annotations

import mmap
import threading
import time
from typing import Any

from numpy.typing import NDArray

from pop_node.store.host_memory import HUGE_PAGE_BYTES, advise, aligned_memory, populate

TOUCH_PAUSE = 3
"""Between steps, in steps: touching takes a quarter of a processor from the answers."""


class SpareMemory:
    """``nbytes`` of it, of which the first ``touched_bytes`` are touched by a thread of its own."""

    def __init__(self, nbytes: int, touched_bytes: int) -> None:
        """Raises ``ConfigError`` if there is no room for it."""
        self._memory: NDArray[Any] | None = aligned_memory(nbytes)
        self._stop = threading.Event()
        touched = min(nbytes, touched_bytes)
        args = (self._memory.ctypes.data, touched, self._stop)
        self._toucher = threading.Thread(target=touch, args=args, name="spare", daemon=True)
        self._toucher.start()

    def take(self, nbytes: int) -> NDArray[Any]:
        """[nbytes] uint8 of zeros: of this memory if it suffices, what is too much of it is given
        back; else, and when it was taken already, new. Raises as ``aligned_memory`` does."""
        self._stop.set()
        self._toucher.join()
        memory, self._memory = self._memory, None
        if memory is None or len(memory) < nbytes:
            return aligned_memory(nbytes)
        kept = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        if kept < len(memory):
            advise(memory.ctypes.data + kept, len(memory) - kept, mmap.MADV_DONTNEED)
        return memory[:nbytes]


def touch(address: int, nbytes: int, stop: threading.Event) -> None:
    """Have pages from ``address`` on before they are needed. In small steps with pauses: whoever
    maps memory waits for a step to end."""
    for start in range(0, nbytes, HUGE_PAGE_BYTES):
        began = time.monotonic()
        if not populate(address + start, min(HUGE_PAGE_BYTES, nbytes - start)):
            return
        if stop.wait(TOUCH_PAUSE * (time.monotonic() - began)):
            return
