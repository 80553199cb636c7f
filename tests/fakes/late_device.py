"""Fakes of an accelerator for a runner, on the CPU.

Copies come as late as events allow, and a graph is a recording that runs its work again.

What a missing wait would read on a real device, it reads here. Kernels are run at once, so what
they themselves overwrite too early does not show.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.reference.kv_pack import kv_pack, kv_unpack
from kernels.reference.penalties import penalize
from kernels.reference.sampling import gumbel_sample
from pop_node.engine.running.sampler import penalize_row
from pop_node.engine.scheduling.schedule import Schedule


class LateEvent:
    """Passes when its lane has come so far; without a lane, at once."""

    def __init__(self) -> None:
        self._lane: LateLane | None = None
        self._until = 0

    def record(self, lane: LateLane | None = None) -> None:
        self._lane = lane
        self._until = 0 if lane is None else lane.queued

    def wait(self) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        if self._lane is not None:
            self._lane.catch_up(self._until)

    def query(self) -> bool:
        return self._lane is None or self._lane.done >= self._until


class LateLane:
    """Copies only when somebody waits for it."""

    def __init__(self) -> None:
        self.queued = self.done = 0
        self._work: deque[Callable[[], Any]] = deque()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.run(lambda: target.copy_(source))

    def record(self, event: LateEvent) -> None:
        event.record(self)

    def wait(self, event: LateEvent) -> None:
        # As the event stands now, whatever is recorded there later.
        lane, until = event._lane, event._until
        if lane is not None:
            self.run(lambda: lane.catch_up(until))

    def catch_up(self, until: int) -> None:
        """Catch up to a mark."""
        while self.done < until:
            self._work.popleft()()
            self.done += 1

    def run(self, work: Callable[[], Any]) -> None:
        self._work.append(work)
        self.queued += 1


class PromptLane(LateLane):
    """Copies at once, for whoever only looks whether a copy has come."""

    def run(self, work: Callable[[], Any]) -> None:
        super().run(work)
        self.catch_up(self.queued)


class LateDevice:
    """A ``cuda_device.Device`` that remembers how often it captured and replayed."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def page_locked(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def page_lock(self, memory: torch.Tensor) -> None:
        """It stays where it is."""

    def lane(self) -> LateLane:
        return LateLane()

    def event(self) -> LateEvent:
        return LateEvent()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        work()

        def replay() -> None:
            self.replays += 1
            work()

        return replay


class PromptDevice(LateDevice):
    """One with lanes that copy at once."""

    def lane(self) -> LateLane:
        return PromptLane()


def reference_move(
    cache: torch.Tensor, piece: torch.Tensor, slots: torch.Tensor, layer_lo: int, pack: bool
) -> None:
    """``kv_mover.Move`` by the reference."""
    if pack:
        piece.copy_(kv_pack(cache.unsqueeze(2), slots, layer_lo, layer_lo + len(piece)))
    else:
        kv_unpack(piece, cache.unsqueeze(2), slots, layer_lo)


class HostSampler:
    """A ``cuda_runner.Sampler`` by the reference; parameters pass through the step's numbers."""

    words = 4

    def pack(self, schedule: Schedule) -> NDArray[np.int64]:
        rows = [schedule.rows[index] for index in schedule.sampled]
        packed = np.empty((len(rows), self.words), np.int64)
        packed[:, 0] = np.array([r.sequence.temperature for r in rows], np.float64).view(np.int64)
        packed[:, 1] = np.array([r.sequence.top_p for r in rows], np.float64).view(np.int64)
        packed[:, 2] = [r.sequence.seed for r in rows]
        packed[:, 3] = [r.end - r.sequence.prompt_tokens for r in rows]
        return packed

    def penalize(self, logits: torch.Tensor, schedule: Schedule) -> None:
        for line, index in enumerate(schedule.sampled):
            row = schedule.rows[index]
            if row.sequence.tally is not None:
                assert row.end == len(row.sequence.ids)
                penalize_row(penalize, logits[line], row.sequence, row.sequence.tally)

    def draw(self, logits: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        words = parameters.numpy()
        temperature, top_p = (words[:, i].copy().view(np.float64).tolist() for i in (0, 1))
        seed, index = (words[:, i].tolist() for i in (2, 3))
        return torch.tensor(
            gumbel_sample(logits, temperature, top_p, seed, [0] * len(words), index)
        )
