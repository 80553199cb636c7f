"""How KV gets between the cache and a staging slot: within the host, or to and from a device.

On a device copies run on a stream of their own. Neither side's host waits for the other: what
computes and what copies are ordered by events. A cache component is [layers, slots, elements] of
integers here, a piece [layers, tokens, elements].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from pop_node.engine.running.cuda_device import Device, Event

Move = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, bool], None]
"""(cache, piece, slots [tokens] int64, first layer, whether into the piece); all on the device."""

Arrived = Callable[[], bool]
"""Whether a copy that was begun is done; does not wait."""

Mark = Event | None
"""A moment in what is queued to be computed; None where nothing is ever queued."""


class Mover(Protocol):
    """Used by two threads, one at a time; ``queued``, ``mark`` and ``release`` by the one that
    computes."""

    def queued(self) -> None:
        """Copies out that are begun from here on come after all that is queued to be computed
        now."""

    def mark(self) -> Mark:
        """What is queued to be computed now, for a copy in that has to come after it, and waits for
        nothing that is queued later."""

    def release(self) -> None:
        """What is computed from here on comes after all copies out that were begun."""

    def copy_out(
        self, cache: torch.Tensor, slots: torch.Tensor, layer_lo: int, target: torch.Tensor
    ) -> Arrived:
        """Begin to copy tokens into ``target``, a piece in staging; ``slots`` are the host's."""

    def copy_in(
        self,
        source: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
        layer_lo: int,
        after: Mark,
    ) -> None:
        """Bring a piece from staging into the cache; it is there on return."""


class HostMover:
    """Copies at once."""

    def queued(self) -> None:
        """It is computed already."""

    def mark(self) -> Mark:
        """It is computed already."""
        return None

    def release(self) -> None:
        """Nothing is under way."""

    def copy_out(
        self, cache: torch.Tensor, slots: torch.Tensor, layer_lo: int, target: torch.Tensor
    ) -> Arrived:
        layers = cache[layer_lo : layer_lo + target.shape[0]]
        target.copy_(layers.index_select(1, slots))
        return _at_once

    def copy_in(
        self,
        source: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
        layer_lo: int,
        after: Mark,
    ) -> None:
        cache[layer_lo : layer_lo + source.shape[0]].index_copy_(1, slots, source)


class DeviceMover:
    """Gathers a piece in a buffer of the device, which goes to page-locked staging; and back."""

    def __init__(self, device: Device, move: Move, slot_bytes: int) -> None:
        self._where = device.device
        self._event = device.event
        self._move = move
        # One for all: copies of a lane are in order.
        self._piece = torch.zeros(slot_bytes, dtype=torch.uint8, device=self._where)
        self._lane = device.lane()
        self._queued, self._read = device.event(), device.event()

    def queued(self) -> None:
        self._queued.record()

    def mark(self) -> Mark:
        event = self._event()
        event.record()
        return event

    def release(self) -> None:
        self._read.wait()

    def copy_out(
        self, cache: torch.Tensor, slots: torch.Tensor, layer_lo: int, target: torch.Tensor
    ) -> Arrived:
        piece = self._as(target)

        def work() -> None:
            self._move(cache, piece, slots.to(self._where, non_blocking=True), layer_lo, True)
            target.copy_(piece, non_blocking=True)

        arrived = self._event()
        self._lane.wait(self._queued)
        self._lane.run(work)
        self._lane.record(self._read)
        self._lane.record(arrived)
        return arrived.query

    def copy_in(
        self,
        source: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
        layer_lo: int,
        after: Mark,
    ) -> None:
        source = source.contiguous()
        piece = self._as(source)

        def work() -> None:
            piece.copy_(source, non_blocking=True)
            self._move(cache, piece, slots.to(self._where, non_blocking=True), layer_lo, False)

        written = self._event()
        self._lane.wait(after)
        self._lane.run(work)
        self._lane.record(written)
        written.synchronize()

    def _as(self, other: torch.Tensor) -> torch.Tensor:
        """The buffer with the type and shape of a piece in staging."""
        return self._piece[: other.nbytes].view(other.dtype).view(other.shape)


def _at_once() -> bool:
    return True
