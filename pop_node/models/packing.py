"""Matrices into the resident form while a model is bound, and the memory of both.

Those of a bundle come packed (``pop_node.store``'s resident arenas); this is for what comes as it
is: plain directories, and matrices whose parts a bundle keeps apart. A matrix in 16 bits is
given back as soon as its 12-bit form is there, so binding takes at most the largest one more than
the model as it was read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from kernels.ops import Ops
from kernels.resident import ResidentMatrix, Weight
from pop_node.store.host_memory import HUGE_PAGE_BYTES, aligned_memory, forget
from wire.errors import ConfigError

if TYPE_CHECKING:  # its own module needs more than a GPU benchmark has
    from pop_node.store.weight_choice import Shape

PIECE_BYTES = 32 * HUGE_PAGE_BYTES
"""Memory is had in pieces of so much, of which only what is used is ever touched: a matrix with
huge pages of its own would waste half a one on average, as much as a small matrix has."""

LINE_BYTES = 64

NOTHING_PACKED: Mapping[tuple[str, ...], ResidentMatrix] = MappingProxyType({})


def as_it_is(weight: torch.Tensor) -> Weight:
    """A ``Packer`` that packs nothing."""
    return weight


class Packer:
    """Packs one matrix after the other."""

    def __init__(self, ops: Ops, *, release: bool, plain: Collection[Shape] = ()) -> None:
        """``release``: what was packed is given back; nobody else may read it then. Matrices of
        ``plain`` shapes stay as they are.

        Raises:
            ConfigError: ``ops`` cannot multiply with the form.
        """
        if ops.pack is None:
            raise ConfigError(
                f"weights 'resident' cannot be used with the {ops.name} backend",
                suggestion="use backend 'native' or 'triton', or weights 'plain'",
            )
        self._pack = ops.pack
        self._release = release
        self._plain = plain
        self._device = ops.device
        self._piece = torch.empty(0, dtype=torch.uint8)

    def __call__(self, weight: torch.Tensor) -> Weight:
        """``weight`` in the form, or as it is where that would not be smaller."""
        if tuple(weight.shape) in self._plain:
            return weight
        room = self._piece
        packed = self._pack(weight, self._allocate)
        if isinstance(packed, torch.Tensor):
            self._piece = room
        elif self._release and weight.device.type == "cpu":
            forget(weight.data_ptr(), weight.nbytes)
        return packed

    def _allocate(self, nbytes: int) -> torch.Tensor:
        """[nbytes] at a line of the cache, where products are computed. Raises ``ConfigError``
        without room."""
        if self._device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        if len(self._piece) < nbytes:
            self._piece = torch.from_numpy(aligned_memory(max(nbytes, PIECE_BYTES)))
        memory = self._piece[:nbytes]
        self._piece = self._piece[-(-nbytes // LINE_BYTES) * LINE_BYTES :]
        return memory
