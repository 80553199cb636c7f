"""Which bytes of a bundle go where in memory: pure arithmetic, for all of it or one rank's part.

Memory is one arena with the tensors in file order, units back to back, so that fused matrices are
views. For a whole model it is the image of the data file: a chunk without interleaved stripes is
read, or decoded, to where it stays. Any other chunk goes through a buffer and is moved.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pop_node.store.layout import Share, TensorEntry, aligned, share_of
from pop_node.store.manifest import Manifest


class Move(NamedTuple):
    """``rows`` times ``width`` bytes, back to back from ``source`` in the chunk, to ``target`` in
    the arena and every ``stride`` bytes after it."""

    source: int
    target: int
    rows: int
    width: int
    stride: int


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """Bytes ``[offset, offset + nbytes)`` of the image. ``in_place`` is where in the arena they
    may be read to as they are, else None."""

    index: int
    offset: int
    nbytes: int
    in_place: int | None
    moves: tuple[Move, ...]


class Bound(NamedTuple):
    """A tensor as it will be: a view of the arena at ``offset``, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """``chunks`` ascend; chunks of which nothing is needed are left out."""

    arena_bytes: int
    chunks: list[ChunkPlan]
    tensors: list[Bound]


def plan_load(manifest: Manifest, rank: int = 0, ranks: int = 1) -> LoadPlan:
    """The plan for rank ``rank`` of ``ranks``, which must divide the bundle's stripes."""
    shares: list[tuple[Share, int]] = []
    tensors = []
    end, unit = 0, -1
    for entry in manifest.tensors:
        share = share_of(entry, manifest.stripes, rank, ranks)
        packed = end if entry.unit == unit else aligned(end)
        at = entry.offset if ranks == 1 else packed
        end, unit = at + share.nbytes, entry.unit
        if share.nbytes:
            shares.append((share, at))
        tensors.append(Bound(entry.name, entry.dtype, share.shape, at))
    arena_bytes = manifest.data.decoded_bytes if ranks == 1 else aligned(end)
    return LoadPlan(arena_bytes, list(_chunks(manifest, shares, whole=ranks == 1)), tensors)


def plan_part(
    manifest: Manifest, entries: Iterable[TensorEntry], also: Container[int] = frozenset()
) -> LoadPlan:
    """The plan for ``entries`` alone, which ascend, close together in memory; units stay back to
    back. Chunks ``also`` are in it whether they hold something of them or not."""
    shares: list[tuple[Share, int]] = []
    tensors = []
    end, unit = 0, -1
    for entry in entries:
        share = share_of(entry, manifest.stripes, 0, 1)
        at = end if entry.unit == unit else aligned(end)
        end, unit = at + share.nbytes, entry.unit
        if share.nbytes:
            shares.append((share, at))
        tensors.append(Bound(entry.name, entry.dtype, share.shape, at))
    chunks = list(_chunks(manifest, shares, whole=False, also=also))
    return LoadPlan(aligned(end), chunks, tensors)


def _chunks(
    manifest: Manifest,
    shares: list[tuple[Share, int]],
    *,
    whole: bool,
    also: Container[int] = frozenset(),
) -> Iterator[ChunkPlan]:
    first = 0
    for index in range(len(manifest.data.chunks)):
        offset, nbytes = manifest.data.decoded_span(index)
        while first < len(shares) and shares[first][0].offset + shares[first][0].nbytes <= offset:
            first += 1
        moves: list[Move] = []
        linear = True
        number = first
        while number < len(shares) and shares[number][0].offset < offset + nbytes:
            share, at = shares[number]
            moves += _moves(share, at, offset, offset + nbytes)
            linear = linear and not share.interleaved
            number += 1
        if moves or index in also:
            yield ChunkPlan(
                index, offset, nbytes, offset if whole and linear else None, tuple(moves)
            )


def _moves(share: Share, at: int, begin: int, end: int) -> Iterator[Move]:
    """How the bytes of file range ``[begin, end)`` that belong to a share at ``at`` get there."""
    lo, hi = max(share.offset, begin), min(share.offset + share.nbytes, end)
    if not share.interleaved:
        yield Move(lo - begin, at + lo - share.offset, 1, hi - lo, hi - lo)
        return
    stripe_bytes = share.nbytes // share.blocks
    width = stripe_bytes // share.shape[0]
    stride = width * share.blocks
    position, stop = lo - share.offset, hi - share.offset
    while position < stop:
        stripe, within = divmod(position, stripe_bytes)
        row, column = divmod(within, width)
        if column or stop - position < width:  # the cut goes through a row
            rows, wide = 1, min(width - column, stop - position)
        else:
            rows, wide = min((stop - position) // width, share.shape[0] - row), width
        target = at + row * stride + stripe * width + column
        yield Move(share.offset + position - begin, target, rows, wide, stride)
        position += rows * wide
