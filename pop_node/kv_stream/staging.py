"""Staging memory: fixed slots in one memfd that the agent owns and the engine maps.

KV bytes go engine -> slot -> socket on the prefill side and socket -> slot -> engine on the decode
side, so they never cross a pipe. Slots ``[0, export_slots)`` are filled by the engine, the rest by
the agent. Which slot is whose at a moment is decided elsewhere; this file only holds the memory.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass

DEFAULT_SLOT_BYTES = 256 * 1024
"""Guess: 682 tokens of one SmolLM2 component and layer, 2.6 ms of a 1 Gbit/s link."""

DEFAULT_EXPORT_SLOTS = 64
DEFAULT_IMPORT_SLOTS = 128
"""16 and 32 MiB: bandwidth x RTT of 1 Gbit/s at 250 ms is 31 MiB."""


@dataclass(frozen=True, slots=True)
class StagingLayout:
    """Shape of the staging memory, told to the engine at its start."""

    slot_bytes: int = DEFAULT_SLOT_BYTES
    export_slots: int = DEFAULT_EXPORT_SLOTS
    import_slots: int = DEFAULT_IMPORT_SLOTS

    @property
    def total_slots(self) -> int:
        return self.export_slots + self.import_slots

    @property
    def total_bytes(self) -> int:
        return self.total_slots * self.slot_bytes


class Staging:
    """The mapped memory: ``create`` in the agent, ``attach`` (with its fd) in the engine."""

    def __init__(self, fd: int, layout: StagingLayout) -> None:
        self.fd = fd
        self.layout = layout
        self._map = mmap.mmap(fd, layout.total_bytes)
        self._view = memoryview(self._map)

    @classmethod
    def create(cls, layout: StagingLayout) -> Staging:
        """Allocate fresh zeroed memory; the fd is close-on-exec and passed by SCM_RIGHTS."""
        fd = os.memfd_create("popmesh-staging", os.MFD_CLOEXEC)
        os.ftruncate(fd, layout.total_bytes)
        return cls(fd, layout)

    @classmethod
    def attach(cls, fd: int, layout: StagingLayout) -> Staging:
        """Map memory that another process created; raises ``ValueError`` if it is too small."""
        if os.fstat(fd).st_size < layout.total_bytes:
            raise ValueError("staging memory is smaller than its layout")
        return cls(fd, layout)

    def slot(self, number: int) -> memoryview:
        """Writable view of one whole slot; raises ``IndexError`` outside the layout."""
        if not 0 <= number < self.layout.total_slots:
            raise IndexError(f"staging slot {number} of {self.layout.total_slots}")
        at = number * self.layout.slot_bytes
        return self._view[at : at + self.layout.slot_bytes]

    def everything(self) -> memoryview:
        """Writable view of all slots."""
        return self._view[: self.layout.total_bytes]

    def close(self) -> None:
        """Close; the memory is unmapped now, or with the last slot view, which a transport or a
        traceback may still hold."""
        self._view.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)
