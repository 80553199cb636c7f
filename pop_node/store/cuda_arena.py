"""Where a model ends up on an accelerator: chunks pass through page-locked buffers.

Each lane has two and a stream of its own: one is read into while the other is copied. The host
never holds more of the model than that.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # the values' own modules need more than torch
    from pop_node.store.load_plan import ChunkPlan, LoadPlan

TURNS = 2
"""Buffers per lane: one is read into while the other is copied from."""


class CudaArena:
    """See ``loader.Arena``. ``memory`` is [bytes] uint8 on the device."""

    phase = "to_device"

    def __init__(self, plan: LoadPlan, lanes: int, chunk_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(plan.arena_bytes, dtype=torch.uint8, device=device)
        self._buffers = torch.empty((lanes, TURNS, chunk_bytes), dtype=torch.uint8, pin_memory=True)
        cuda: Any = torch.cuda  # whose constructors carry no types
        self._streams = [cuda.Stream(device) for _ in range(lanes)]
        for stream in self._streams:  # memory may be handed out while its last use is still queued
            stream.wait_stream(cuda.current_stream(device))
        self._copied = [[cuda.Event() for _ in range(TURNS)] for _ in range(lanes)]
        self._turns = [0] * lanes

    def prepare(self, stop: threading.Event) -> None:
        """Page-locked buffers are touched already."""

    def landing(self, lane: int, chunk: ChunkPlan) -> memoryview:
        """The lane's next buffer, once what it held is on the device."""
        turn = self._turns[lane] = (self._turns[lane] + 1) % TURNS
        self._copied[lane][turn].synchronize()
        return self._buffers[lane, turn].numpy().data[: chunk.nbytes]

    def decode(self, lane: int, chunk: ChunkPlan, stored: memoryview) -> None:
        """To its landing, and from there as ``place`` does."""
        from kernels.codec import decode_run  # only for packed models

        decode_run(stored, self.landing(lane, chunk))
        self.place(lane, chunk)

    def place(self, lane: int, chunk: ChunkPlan) -> int:
        """Begin to copy a verified chunk; returns the bytes under way."""
        turn = self._turns[lane]
        buffer = self._buffers[lane, turn]
        moved = 0
        with torch.cuda.stream(self._streams[lane]):
            for move in chunk.moves:
                nbytes = move.rows * move.width
                source = buffer[move.source : move.source + nbytes].view(move.rows, move.width)
                target = self.memory.as_strided(
                    (move.rows, move.width), (move.stride, 1), move.target
                )
                target.copy_(source, non_blocking=True)
                moved += nbytes
            self._copied[lane][turn].record()
        return moved

    def finish(self) -> None:
        """Wait until everything is on the device."""
        for stream in self._streams:
            stream.synchronize()
