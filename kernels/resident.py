"""Weights as they stay in memory: bfloat16 matrices as they are, or in 12 bits with the same bits.

Exponents of a trained matrix keep to a few values around the one of its largest weights, so a code
of 4 bits into a palette of the 16 most frequent ones stands for nearly all of them; the rest are
escapes, listed. ``kernels.reference.resident`` makes and undoes the form; native and Triton
operations multiply with it as it is. Whether it shrinks a matrix is known once it was tried.
``kernels.resident_layout`` has the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.resident_layout import (
    ESCAPE_SHARE,
    GROUP_BYTES,
    GROUP_COLUMNS,
    MAX_GROUPS,
    PALETTE,
    TILE_ROWS,
    escape_room,
    group_count,
    pays,
    resident_bytes,
    tile_count,
)

__all__ = [
    "ESCAPE_SHARE",
    "GROUP_BYTES",
    "GROUP_COLUMNS",
    "MAX_GROUPS",
    "PALETTE",
    "TILE_ROWS",
    "ResidentMatrix",
    "Weight",
    "choose_palette",
    "escape_room",
    "group_count",
    "may_pack",
    "resident_bytes",
    "tile_count",
]


@dataclass(frozen=True, slots=True)
class ResidentMatrix:
    """A matrix of ``shape`` (N, K) in the resident form."""

    shape: tuple[int, int]
    palette: torch.Tensor  # [16] uint8: exponents by code, on the host
    tiles: torch.Tensor  # [ceil(N / 4), ceil(K / 64), 384] uint8, contiguous, 64-byte aligned
    starts: torch.Tensor  # [ceil(N / 4) + 1] int32: where the escapes of each tile begin
    escapes: torch.Tensor  # int32

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that it stands for."""
        return torch.bfloat16

    @property
    def nbytes(self) -> int:
        """What it takes of memory."""
        return sum(t.nbytes for t in (self.palette, self.tiles, self.starts, self.escapes))

    def to(self, device: torch.device) -> ResidentMatrix:
        """It on ``device``, itself where it is there."""
        if self.tiles.device == device:
            return self
        moved = (part.to(device) for part in (self.tiles, self.starts, self.escapes))
        return ResidentMatrix(self.shape, self.palette, *moved)


Weight = torch.Tensor | ResidentMatrix
"""A matrix of a model, [out, in]."""


def may_pack(weight: torch.Tensor) -> bool:
    """Is ``weight`` of a kind that the form exists for, and can it be smaller in it?

    Floats of 32 bits have no repeated exponents to speak of.
    """
    if weight.dtype is not torch.bfloat16 or weight.dim() != 2 or weight.stride(1) != 1:
        return False
    return pays(*weight.shape)


def choose_palette(counts: torch.Tensor) -> torch.Tensor:
    """The 16 most frequent of ``counts`` [256] by exponent, ascending: [16] uint8."""
    frequent = torch.argsort(counts, descending=True, stable=True)[:PALETTE]
    return frequent.sort().values.to(torch.uint8)
