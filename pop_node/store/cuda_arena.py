"""Where a model ends up on an accelerator: chunks pass through page-locked buffers.

Each lane has two and a stream of its own: one is read into while the other is copied. The host
never holds more of the model than that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from wire.errors import ConfigError

if TYPE_CHECKING:  # the values' own modules need more than torch
    from pop_node.store.load_plan import ChunkPlan, LoadPlan, Move

TURNS = 2
"""Buffers per lane: one is read into while the other is copied from."""

_cuda: Any = torch.cuda  # whose constructors carry no types

Find = Callable[["Move"], torch.Tensor]
"""From a move to memory of the device, [bytes] uint8, that begins with its target."""


class CudaLanes:
    """The buffers and streams of a load's lanes."""

    def __init__(self, lanes: int, chunk_bytes: int, device: torch.device) -> None:
        self._buffers = torch.empty((lanes, TURNS, chunk_bytes), dtype=torch.uint8, pin_memory=True)
        self.streams = [_cuda.Stream(device) for _ in range(lanes)]
        self._copied = [[_cuda.Event() for _ in range(TURNS)] for _ in range(lanes)]
        self._turns = [0] * lanes

    def landing(self, lane: int, nbytes: int) -> memoryview:
        """The lane's next buffer, once what it held is on the device."""
        turn = self._turns[lane] = (self._turns[lane] + 1) % TURNS
        self._copied[lane][turn].synchronize()
        return self._buffers[lane, turn].numpy().data[:nbytes]

    def decode(self, lane: int, nbytes: int, stored: memoryview) -> None:
        """A packed chunk of ``nbytes`` to its landing. Raises ``CodecError``."""
        from kernels.codec import decode_run  # only for packed models

        decode_run(stored, self.landing(lane, nbytes))

    @contextmanager
    def copying(self, lane: int) -> Iterator[None]:
        """What is copied within comes from the lane's buffer, in its stream."""
        with torch.cuda.stream(self.streams[lane]):
            yield
            self._copied[lane][self._turns[lane]].record()

    def copy(self, lane: int, moves: tuple[Move, ...], find: Find) -> int:
        """Begin to copy a verified chunk, within ``copying``; returns the bytes under way."""
        buffer = self._buffers[lane, self._turns[lane]]
        moved = 0
        for move in moves:
            nbytes = move.rows * move.width
            source = buffer[move.source : move.source + nbytes].view(move.rows, move.width)
            target = find(move).as_strided((move.rows, move.width), (move.stride, 1))
            target.copy_(source, non_blocking=True)
            moved += nbytes
        return moved


def device_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """[bytes] uint8. Raises ``ConfigError`` without room."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as exc:
        raise ConfigError(
            f"no room on {device} for {nbytes} bytes of weights",
            suggestion="weights 'resident' take less, or serve the model on a larger device",
        ) from exc


class CudaArena:
    """See ``loader.Arena``. ``memory`` is [bytes] uint8 on the device."""

    phase = "to_device"

    def __init__(self, plan: LoadPlan, lanes: int, chunk_bytes: int, device: torch.device) -> None:
        """Raises ``ConfigError`` without room."""
        self.memory = device_memory(plan.arena_bytes, device)
        self._lanes = CudaLanes(lanes, chunk_bytes, device)
        for stream in self._lanes.streams:
            # Memory may be handed out while its last use is still queued.
            stream.wait_stream(_cuda.current_stream(device))

    def prepare(self, stop: threading.Event) -> None:
        """Page-locked buffers are touched already."""

    def landing(self, lane: int, chunk: ChunkPlan) -> memoryview:
        """The lane's next buffer, once what it held is on the device."""
        return self._lanes.landing(lane, chunk.nbytes)

    def decode(self, lane: int, chunk: ChunkPlan, stored: memoryview) -> None:
        """To its landing, and from there as ``place`` does."""
        self._lanes.decode(lane, chunk.nbytes, stored)
        self.place(lane, chunk)

    def place(self, lane: int, chunk: ChunkPlan) -> int:
        """Begin to copy a verified chunk; returns the bytes under way."""
        with self._lanes.copying(lane):
            return self._lanes.copy(lane, chunk.moves, lambda move: self.memory[move.target :])

    def finish(self) -> None:
        """Wait until everything is on the device."""
        for stream in self._lanes.streams:
            stream.synchronize()
