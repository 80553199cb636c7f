"""Where a model ends up on an accelerator with its matrices in the resident form, packed there as
they arrive.

Chunks travel as in ``cuda_arena``. A matrix has memory of its own from its first byte until the
last one was copied; then whoever placed that packs it, and gives the memory back. So the device has
to have room for the 12-bit form and a few matrices, and packing lies beside reading.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kernels.resident import ResidentMatrix, Weight
from pop_node.store.cuda_arena import CudaLanes, device_memory
from pop_node.store.load_plan import ChunkPlan, LoadPlan, Move
from pop_node.store.unit_plan import Unit, UnitPlan

_cuda: Any = torch.cuda  # whose constructors carry no types

Pack = Callable[[torch.Tensor, Callable[[int], torch.Tensor]], Weight]
"""``kernels.ops.Ops.pack``."""


@dataclass(frozen=True, slots=True)
class UnitMemory:
    """On the device: ``packed`` matrices by the names of what they are of, and what is left as it
    is, with the unit that it is."""

    packed: dict[tuple[str, ...], ResidentMatrix]
    plain: tuple[tuple[Unit, torch.Tensor], ...]


@dataclass(slots=True)
class _Filling:
    """A unit under way: its memory [bytes] uint8, which is to be had ``after``."""

    memory: torch.Tensor
    after: Any
    missing_bytes: int


class CudaResidentArena:
    """See ``loader.Arena``."""

    phase = "to_device"

    def __init__(
        self, plan: LoadPlan, lanes: int, chunk_bytes: int, device: torch.device, pack: Pack
    ) -> None:
        """``plan`` is a ``UnitPlan``."""
        assert isinstance(plan, UnitPlan)
        self.memory: UnitMemory | None = None
        """Is there once ``finish`` has returned."""
        self._plan = plan
        self._device = device
        self._pack = pack
        self._lanes = CudaLanes(lanes, chunk_bytes, device)
        # What is allocated here is used first, and again, in order with this stream.
        self._stream = _cuda.Stream(device)
        self._stream.wait_stream(_cuda.current_stream(device))
        self._filling: dict[int, _Filling] = {}
        self._packed: dict[tuple[str, ...], ResidentMatrix] = {}
        self._plain: list[tuple[Unit, torch.Tensor]] = []
        self._lock, self._packing = threading.Lock(), threading.Lock()

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
        """Begin to copy a verified chunk, and pack what is whole by it; returns the bytes copied.
        Raises ``ConfigError`` without room."""
        numbers = {self._plan.unit_at(move.target) for move in chunk.moves}
        filling = {number: self._begin(number) for number in sorted(numbers)}

        def find(move: Move) -> torch.Tensor:
            number = self._plan.unit_at(move.target)
            return filling[number].memory[move.target - self._plan.units[number].begin :]

        for unit in filling.values():
            self._lanes.streams[lane].wait_event(unit.after)
        with self._lanes.copying(lane):
            moved = self._lanes.copy(lane, chunk.moves, find)
        for number in self._whole(chunk.moves):
            self._keep(self._plan.units[number], filling[number].memory)
        return moved

    def finish(self) -> None:
        """Wait until everything is on the device."""
        assert not self._filling, "a unit did not arrive as a whole"
        for stream in (*self._lanes.streams, self._stream):
            stream.synchronize()
        self.memory = UnitMemory(self._packed, tuple(self._plain))

    def _begin(self, number: int) -> _Filling:
        """The memory of a unit that a chunk has something of."""
        with self._lock:
            if number not in self._filling:
                unit = self._plan.units[number]
                with torch.cuda.stream(self._stream):
                    memory = device_memory(unit.end - unit.begin, self._device)
                    after = _cuda.Event()
                    after.record()
                self._filling[number] = _Filling(memory, after, unit.nbytes)
            return self._filling[number]

    def _whole(self, moves: tuple[Move, ...]) -> list[int]:
        """Units of which all copies are queued, now that those of ``moves`` are."""
        found = []
        with self._lock:
            for move in moves:
                number = self._plan.unit_at(move.target)
                self._filling[number].missing_bytes -= move.rows * move.width
                if self._filling[number].missing_bytes == 0:
                    del self._filling[number]
                    found.append(number)
        return found

    def _keep(self, unit: Unit, memory: torch.Tensor) -> None:
        """Pack it, if it is a matrix that gets smaller by it."""
        if unit.shape is None:
            with self._lock:
                self._plain.append((unit, memory))
            return
        with self._packing, torch.cuda.stream(self._stream):
            for stream in self._lanes.streams:
                self._stream.wait_stream(stream)
            matrix = memory.view(torch.bfloat16).view(unit.shape)
            packed = self._pack(matrix, partial(device_memory, device=self._device))
            if isinstance(packed, ResidentMatrix):
                self._packed[unit.names] = packed
            else:
                with self._lock:
                    self._plain.append((unit, memory))
