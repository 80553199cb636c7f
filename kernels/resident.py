"""Weights as they stay in memory: bfloat16 matrices as they are, or in 12 bits with the same bits.

Exponents of a trained matrix keep to a few values around the one of its largest weights, so a code
of 4 bits into a palette of the 16 most frequent ones stands for nearly all of them; the rest are
escapes, listed. ``kernels.reference.resident`` makes and undoes the form; the native operations
multiply with it as it is. Whether it shrinks a matrix is known once it was tried.

Layout, for a matrix [N, K]: rows in tiles of 4, columns in groups of 64, both padded with zeros.
A group of a tile is 384 bytes:

======== ======= ==============================================================================
bytes    shape   what
======== ======= ==============================================================================
0-255    [4, 64] sign and mantissa of each weight: sign << 7 | mantissa
256-383  [2, 64] codes of rows 0 and 1, then of rows 2 and 3; the lower row's in the low 4 bits
======== ======= ==============================================================================

Column c of a group lies at byte ``c // 8 % 4 * 16 + c // 32 * 8 + c % 8`` of its 64. An escape is a
word: group << 16 | row << 14 | column << 8 | exponent; those of a tile ascend. The form lives in
the memory of one process and is never read from outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_ROWS = 4
GROUP_COLUMNS = 64
GROUP_BYTES = TILE_ROWS * GROUP_COLUMNS * 3 // 2
PALETTE = 16

MAX_GROUPS = 1 << 15
"""Of a row: an escape has 16 bits for its group, and is kept as a signed word."""

ESCAPE_SHARE = 32
"""One weight in so many may be an escape, of 4 bytes: more, and an eighth of a byte a weight of the
half byte that the form saves would be gone. Trained matrices have one in some thousands."""


@dataclass(frozen=True, slots=True)
class ResidentMatrix:
    """A matrix of ``shape`` (N, K) in the resident form."""

    shape: tuple[int, int]
    palette: torch.Tensor  # [16] uint8: exponents by code
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


Weight = torch.Tensor | ResidentMatrix
"""A matrix of a model, [out, in]."""


def tile_count(rows: int) -> int:
    """Tiles of a matrix of ``rows`` rows."""
    return -(-rows // TILE_ROWS)


def group_count(columns: int) -> int:
    """Groups of a row of ``columns`` columns."""
    return -(-columns // GROUP_COLUMNS)


def resident_bytes(rows: int, columns: int) -> int:
    """Bytes of the planes of a matrix, which are all but its escapes and their index."""
    return tile_count(rows) * group_count(columns) * GROUP_BYTES


def may_pack(weight: torch.Tensor) -> bool:
    """Is ``weight`` of a kind that the form exists for, and can it be smaller in it?

    Floats of 32 bits have no repeated exponents to speak of, and padding may cost small matrices
    more than is saved.
    """
    if weight.dtype is not torch.bfloat16 or weight.dim() != 2 or weight.stride(1) != 1:
        return False
    rows, columns = weight.shape
    return resident_bytes(rows, columns) < weight.numel() * 2 and group_count(columns) < MAX_GROUPS


def escape_room(rows: int, columns: int) -> int:
    """How many escapes a matrix may have at most to be kept in the form."""
    return rows * columns // ESCAPE_SHARE


def choose_palette(counts: torch.Tensor) -> torch.Tensor:
    """The 16 most frequent of ``counts`` [256] by exponent, ascending: [16] uint8."""
    frequent = torch.argsort(counts, descending=True, stable=True)[:PALETTE]
    return frequent.sort().values.to(torch.uint8)
