"""Resident weights on the native kernels: making them, multiplying with them, reading rows.

Knows the C structure of ``weights/resident.h`` and the lifetime of what it points to.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, addressof, c_uint8, c_void_p

import torch

from kernels.native.binding import NativeContext
from kernels.native.checks import require
from kernels.resident import (
    GROUP_BYTES,
    PALETTE,
    ResidentMatrix,
    Weight,
    escape_room,
    group_count,
    may_pack,
    tile_count,
)

SAMPLE_WEIGHTS = 1 << 22
"""Weights that a palette is chosen by, at least where there are so many: rare exponents that they
miss become escapes. Counting goes at 2 GB/s."""

_TOO_MANY_ESCAPES = -2


class Resident(Structure):
    """``pm_resident``."""

    _fields_ = (
        ("tiles", c_void_p),
        ("starts", c_void_p),
        ("escapes", c_void_p),
        ("palette", c_uint8 * PALETTE),
    )


class Matrix(Structure):
    """``pm_matrix``."""

    _fields_ = (("rows", c_void_p), ("resident", c_void_p))


def resident_of(matrix: ResidentMatrix) -> Resident:
    """``matrix`` as C sees it, as long as ``matrix`` lives. Raises ValueError: inconsistent."""
    rows, columns = matrix.shape
    planes = (tile_count(rows), group_count(columns), GROUP_BYTES)
    require(
        matrix.tiles.shape == planes
        and matrix.tiles.is_contiguous()
        and matrix.tiles.data_ptr() % 64 == 0
        and matrix.starts.shape == (planes[0] + 1,)
        and int(matrix.starts[-1]) == len(matrix.escapes)
        and all(t.is_contiguous() for t in (matrix.starts, matrix.escapes)),
        *("resident matrix", matrix.tiles, matrix.starts, matrix.escapes),
    )
    return Resident(
        *(matrix.tiles.data_ptr(), matrix.starts.data_ptr(), matrix.escapes.data_ptr()),
        (c_uint8 * PALETTE)(*matrix.palette.tolist()),
    )


def matrix_of(weight: Weight, kept: list[Resident]) -> Matrix:
    """``weight`` as C sees it; what it points to besides tensors is added to ``kept``."""
    if isinstance(weight, torch.Tensor):
        return Matrix(weight.data_ptr(), None)
    resident = resident_of(weight)
    kept.append(resident)
    return Matrix(None, addressof(resident))


def aligned_bytes(nbytes: int) -> torch.Tensor:
    """[nbytes] uint8 at a line of the cache."""
    room = torch.empty(nbytes + 63, dtype=torch.uint8)
    return room[-room.data_ptr() % 64 :][:nbytes]


def pack(
    context: NativeContext,
    weight: torch.Tensor,
    allocate: Callable[[int], torch.Tensor] = aligned_bytes,
) -> Weight:
    """``weight`` [N, K] in the resident form, or as it is where that would not be smaller.

    Args:
        allocate: memory for so many bytes, [n] uint8, at a line of the cache.

    Raises:
        MemoryError: the pool has no memory.
    """
    if not may_pack(weight):
        return weight
    rows, columns = weight.shape
    lib, stride = context.lib, weight.stride(0)
    palette = torch.empty(PALETTE, dtype=torch.uint8)
    shape = (tile_count(rows), group_count(columns), GROUP_BYTES)
    tiles = allocate(shape[0] * shape[1] * shape[2]).view(shape)
    starts = torch.empty(shape[0] + 1, dtype=torch.int32)
    keys = torch.empty(escape_room(rows, columns), dtype=torch.int64)
    found = lib.pm_resident_pack(
        *(context.handle, weight.data_ptr(), rows, columns, stride, SAMPLE_WEIGHTS),
        *(palette.data_ptr(), tiles.data_ptr(), starts.data_ptr(), keys.data_ptr(), len(keys)),
    )
    if found == _TOO_MANY_ESCAPES:
        return weight
    if found < 0:
        raise MemoryError("no memory to pack a matrix")
    escapes = keys[:found].view(torch.int32)[::2].clone()  # what is above is the tile
    return ResidentMatrix((rows, columns), palette, tiles, starts, escapes)
