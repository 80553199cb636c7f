"""Matrices into the resident form on a GPU, with torch's operations, some rows at a time.

The layout is ``kernels.resident``'s; the palette is a window of 16 exponents in a row wherever that
leaves few escapes, since a GPU decodes it in a third of the operations
(``kernels.triton.resident_form``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.reference.resident import exponents_of, pack_rows
from kernels.resident import (
    GROUP_BYTES,
    PALETTE,
    TILE_ROWS,
    ResidentMatrix,
    Weight,
    choose_palette,
    escape_room,
    group_count,
    may_pack,
    tile_count,
)

SLICE_WEIGHTS = 1 << 23
"""Packed at once: some 40 bytes of scratch memory for each, 340 MB."""

WINDOW_ESCAPES = 1 << 10
"""One weight in so many may be an escape for the sake of a window: four in a tile of 4,096 columns.
Guess."""


def choose_window(counts: torch.Tensor) -> torch.Tensor:
    """The 16 exponents in a row that the most of ``counts`` [256] have: [16] uint8."""
    inside = counts.unfold(0, PALETTE, 1).sum(1)
    return (int(inside.argmax()) + torch.arange(PALETTE)).to(torch.uint8)


def palette_for(counts: torch.Tensor) -> torch.Tensor:
    """What weights with ``counts`` [256] by exponent are coded with: [16] uint8."""
    window = choose_window(counts)
    left_out = int(counts.sum() - counts[window.long()].sum())
    if left_out * WINDOW_ESCAPES <= int(counts.sum()):
        return window
    return choose_palette(counts)


def pack(weight: torch.Tensor, allocate: Callable[[int], torch.Tensor]) -> Weight:
    """``weight`` [N, K] in the resident form, or as it is where that would not be smaller.

    Args:
        allocate: memory for so many bytes where ``weight`` is, [n] uint8, aligned to 16.
    """
    if not may_pack(weight):
        return weight
    rows, columns = weight.shape
    height = max(1, SLICE_WEIGHTS // columns // TILE_ROWS) * TILE_ROWS
    slices = weight.split(height)
    counts = torch.zeros(256, dtype=torch.int64, device=weight.device)
    for part in slices:
        counts += torch.bincount(exponents_of(part).flatten(), minlength=256)
    palette = palette_for(counts.cpu())
    if int(counts.sum() - counts[palette.long()].sum()) > escape_room(rows, columns):
        return weight
    shape = (tile_count(rows), group_count(columns), GROUP_BYTES)
    tiles = allocate(shape[0] * shape[1] * shape[2]).view(shape)
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32, device=weight.device)
    escapes = []
    tile = 0
    for part in slices:
        made, escaped, found = pack_rows(part, palette)
        tiles[tile : tile + len(made)] = made
        starts[tile + 1 : tile + len(made) + 1] = escaped
        escapes.append(found)
        tile += len(made)
    starts = starts.cumsum(0, dtype=torch.int32)
    return ResidentMatrix((rows, columns), palette, tiles, starts, torch.cat(escapes))
