"""Where the tensors of a bundle lie in its data file, and what a rank of a parallel group reads.

    weights.bin  |<-------- unit -------->|pad|<- unit ->|pad| ...            |pad|
                 |   q   |   k   |   v   |   |     o    |   | gate |  up  |  |   |
    chunks       |    0    |    1    |    2    |    3    |    4    |    5    |  6  |

A *unit* holds tensors that a model multiplies as one, back to back, so that the fused matrix is a
view. It begins at a multiple of ``ALIGNMENT``, so does the end of the file. Chunks of
``CHUNK_BYTES`` (the last one may be shorter) cut the file without regard to tensors: each has a
digest of its own, so that it can be fetched, verified and loaded by itself, and each is a legal
direct read.

A tensor with a shard axis consists of S *stripes* in order, each contiguous. Of axis 0 that is just
row-major order; of axis 1 each stripe is a row-major block of columns:

    matrix, S = 2          on the disk
    a b | c d              a b   e f   c d   g h
    e f | g h              '--stripe 0-' '--stripe 1-'

Rank r of T (T divides S) needs stripes [r S/T, (r + 1) S/T): one contiguous range of the tensor, so
sites of different T hold and exchange the same chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from pop_node.models.storage_order import StorageOrder, Unit
from pop_node.store.dtypes import storage

ALIGNMENT = 4096
"""Offset, length and memory address of a direct read are multiples of the drive's logical block:
512 or 4096 bytes (open(2), O_DIRECT)."""

CHUNK_BYTES = 4 * 1024 * 1024
"""Measured on two busy cores: a load is as fast with 8 MiB and a fifth slower with 1 MiB. Larger
ones cost pool memory and what a damaged chunk wastes, smaller ones manifest (64 bytes each)."""


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor: bytes ``[offset, offset + nbytes)`` of the data file, little-endian.

    ``axis`` is the one it is striped along, None for a tensor that every rank needs whole. ``unit``
    numbers the units in file order. ``blake3`` is of the tensor in row-major order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    axis: int | None
    unit: int
    blake3: str


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor to be laid out: its name, element type in the bundle and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def lay_out(tensors: Sequence[Described], order: StorageOrder) -> list[TensorEntry]:
    """Entries (without digests) in file order: the family's units, then the rest by name."""
    by_name = {tensor.name: tensor for tensor in tensors}
    entries: list[TensorEntry] = []
    at = 0
    for number, unit in enumerate(_units(by_name, order)):
        at = aligned(at)
        for name, axis in zip(unit.names, unit.axes, strict=True):
            tensor = by_name[name]
            if axis is not None and not _divides(tensor.shape, axis, order.stripes):
                axis = None
            nbytes = math.prod(tensor.shape) * storage(tensor.dtype).itemsize
            entries.append(
                TensorEntry(name, tensor.dtype, tensor.shape, at, nbytes, axis, number, "")
            )
            at += nbytes
    return entries


def _units(tensors: dict[str, Described], order: StorageOrder) -> list[Unit]:
    units = []
    for unit in order.units:
        present = [pair for pair in zip(unit.names, unit.axes, strict=True) if pair[0] in tensors]
        if len({tensors[name].dtype for name, _ in present}) > 1:  # cannot be one matrix
            units += [Unit((name,), (axis,)) for name, axis in present]
        elif present:
            names, axes = zip(*present, strict=True)
            units.append(Unit(names, axes))
    placed = {name for unit in units for name in unit.names}
    return units + [Unit((name,), (None,)) for name in sorted(tensors.keys() - placed)]


def _divides(shape: tuple[int, ...], axis: int, stripes: int) -> bool:
    return len(shape) == 2 and stripes > 1 and shape[axis] > 0 and shape[axis] % stripes == 0


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to ``ALIGNMENT``."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Share(NamedTuple):
    """What one rank needs of a tensor: bytes ``[offset, offset + nbytes)`` of the data file.

    They hold ``blocks`` stripes; side by side along ``axis`` these make the rank's ``shape``.
    """

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    blocks: int

    @property
    def interleaved(self) -> bool:
        """Its bytes are not in row-major order."""
        return self.blocks > 1


def share_of(entry: TensorEntry, stripes: int, rank: int, ranks: int) -> Share:
    """The share of ``rank`` among ``ranks``, which must divide ``stripes``."""
    assert stripes % ranks == 0, (stripes, ranks)
    assert 0 <= rank < ranks, (rank, ranks)
    if entry.axis is None:
        return Share(entry.offset, entry.nbytes, entry.shape, 1)
    nbytes = entry.nbytes // ranks
    shape = list(entry.shape)
    shape[entry.axis] //= ranks
    blocks = stripes // ranks if entry.axis == 1 else 1
    return Share(entry.offset + rank * nbytes, nbytes, tuple(shape), blocks)
