"""Where a model ends up on the CPU: one mapping, filled in place where the layout allows it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from pop_node.store.host_memory import HUGE_PAGE_BYTES, aligned_memory, populate
from pop_node.store.load_plan import ChunkPlan, LoadPlan, Move
from pop_node.store.spare_memory import SpareMemory

PREPARE_BYTES = 4 * HUGE_PAGE_BYTES
"""Touched at a time: 0.4 ms of one processor, for which others that map memory have to wait."""


class HostArena:
    """See ``loader.Arena``. The memory lives as long as an array or tensor that views it."""

    phase = "decode"

    def __init__(
        self, plan: LoadPlan, lanes: int, chunk_bytes: int, spare: SpareMemory | None = None
    ) -> None:
        """Takes memory from ``spare`` where there is any. Raises ``ConfigError`` without room."""
        nbytes = plan.arena_bytes
        self.memory = aligned_memory(nbytes) if spare is None else spare.take(nbytes)
        self._view = self.memory.data
        # The first reads touch their own memory before ``prepare`` could.
        self._prepare_from = lanes * chunk_bytes
        moved = any(chunk.in_place is None for chunk in plan.chunks)
        self._buffers = [aligned_memory(chunk_bytes) for _ in range(lanes if moved else 0)]

    def prepare(self, stop: threading.Event) -> None:
        """Touch the memory ahead of the reads: a read that does it itself keeps the drive waiting.

        Measured: 3.37 GB/s without, 3.66 with, where 16 readers without any checking get 3.61.
        """
        touch_ahead(self.memory, self._prepare_from, stop)

    def landing(self, lane: int, chunk: ChunkPlan) -> memoryview:
        """Its last place or the lane's own buffer."""
        if chunk.in_place is not None:
            return self._view[chunk.in_place : chunk.in_place + chunk.nbytes]
        return self._buffers[lane].data[: chunk.nbytes]

    def decode(self, lane: int, chunk: ChunkPlan, stored: memoryview) -> None:
        """To its landing, and from there as ``place`` does."""
        # Only here: raw models are loaded without it, and a cold start counts every import.
        from kernels.codec import decode_run

        decode_run(stored, self.landing(lane, chunk))
        self.place(lane, chunk)

    def place(self, lane: int, chunk: ChunkPlan) -> int:
        """Move a verified chunk out of its buffer; returns the bytes moved."""
        if chunk.in_place is not None:
            return 0
        return copy_moves(self._buffers[lane], self.memory, chunk.moves)

    def finish(self) -> None:
        """Nothing is under way after ``place``."""


def touch_ahead(memory: NDArray[Any], start: int, stop: threading.Event) -> None:
    """Have the pages of ``memory`` from ``start`` on, until ``stop`` is set."""
    base, end = memory.ctypes.data, len(memory)
    for at in range(start, end, PREPARE_BYTES):
        if stop.is_set() or not populate(base + at, min(PREPARE_BYTES, end - at)):
            return


def copy_moves(chunk: NDArray[Any], memory: NDArray[Any], moves: Iterable[Move]) -> int:
    """Move bytes of ``chunk`` where they belong in ``memory``; returns how many."""
    moved = 0
    for move in moves:
        nbytes = move.rows * move.width
        source = chunk[move.source : move.source + nbytes].reshape(move.rows, move.width)
        shape, strides = (move.rows, move.width), (move.stride, 1)
        np.copyto(as_strided(memory[move.target :], shape, strides), source)
        moved += nbytes
    return moved
