"""Which bytes of a bundle become which tiles of the resident form: pure arithmetic.

A unit of the bundle whose tensors are bfloat16 matrices of one width is a matrix of the form
(``kernels.resident_layout``), as the model multiplies it. In the image of the data file it is a
row of *panels*: one where it lies in row-major order, a stripe each where its columns are cut. A
tile of a panel is a run of bytes, so a chunk holds whole tiles of it, and at either end perhaps a
part of one: a *seam*, which is packed once the chunks around it have brought all of it.

What is no matrix, and one whose stripes do not end with a group, is placed as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from kernels.resident_layout import (
    GROUP_BYTES,
    GROUP_COLUMNS,
    TILE_ROWS,
    group_count,
    pays,
    resident_bytes,
)
from pop_node.store.layout import TensorEntry, aligned, share_of
from pop_node.store.load_plan import LoadPlan, plan_part
from pop_node.store.manifest import Manifest
from pop_node.store.weight_choice import Shape

WEIGHT_BYTES = 2

SHORT_BYTES = 128 * 1024
"""Less than so much of a matrix at an end of a chunk belongs to the seam: too little to choose a
palette by, and soon there is more."""


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """A matrix of ``names`` [rows, columns], whose image begins at ``offset`` in ``panels`` panels,
    and whose tiles begin at ``target`` of those of all."""

    names: tuple[str, ...]
    rows: int
    columns: int
    offset: int
    panels: int
    target: int

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.columns // self.panels

    @property
    def panel_bytes(self) -> int:
        """Of the image."""
        return self.rows * self.width * WEIGHT_BYTES

    @property
    def tile_bytes(self) -> int:
        """Of the image, of a panel: a whole tile's."""
        return TILE_ROWS * self.width * WEIGHT_BYTES

    @property
    def stored_tile_bytes(self) -> int:
        """Of the form: a tile of all panels."""
        return group_count(self.columns) * GROUP_BYTES


class Span(NamedTuple):
    """Bytes ``[begin, end)`` of a panel."""

    begin: int
    end: int


class Piece(NamedTuple):
    """``span`` of panel ``panel`` of a matrix, from ``source`` in a chunk on: whole tiles, or with
    a ``seam`` a part of those."""

    matrix: int
    panel: int
    span: Span
    source: int
    seam: Span | None


@dataclass(frozen=True, slots=True)
class ResidentPlan(LoadPlan):
    """``arena_bytes``, ``tensors`` and the moves of ``chunks`` are of what is placed as it is, for
    which there is memory of its own beside ``tiles_bytes`` of tiles. ``pieces`` say by chunk what
    becomes of the rest, whole tiles first."""

    matrices: tuple[MatrixPlan, ...]
    tiles_bytes: int
    pieces: dict[int, tuple[Piece, ...]]


def plan_resident(manifest: Manifest, plain: Collection[Shape] = ()) -> ResidentPlan:
    """The plan for a whole model; matrices of ``plain`` shapes are placed as they are."""
    matrices, rest = _split(manifest, plain)
    pieces = _pieces(manifest, matrices)
    placed = plan_part(manifest, rest, also=pieces)
    return ResidentPlan(
        arena_bytes=placed.arena_bytes,
        chunks=placed.chunks,
        tensors=placed.tensors,
        matrices=tuple(matrices),
        tiles_bytes=_tiles_bytes(matrices),
        pieces=pieces,
    )


def weights_bytes(manifest: Manifest) -> int:
    """What the weights of a model take of memory by its plan. Their escapes come on top."""
    matrices, rest = _split(manifest, ())
    plain = 0
    for _, unit in groupby(rest, key=lambda entry: entry.unit):
        plain += aligned(sum(entry.nbytes for entry in unit))
    return _tiles_bytes(matrices) + plain


def _split(
    manifest: Manifest, plain: Collection[Shape]
) -> tuple[list[MatrixPlan], list[TensorEntry]]:
    """Matrices of the form, and what stays as it is."""
    matrices: list[MatrixPlan] = []
    rest: list[TensorEntry] = []
    target = 0
    for _, entries in groupby(manifest.tensors, key=lambda entry: entry.unit):
        unit = list(entries)
        matrix = _matrix(unit, manifest.stripes, target)
        if matrix is None or (matrix.rows, matrix.columns) in plain:
            rest += unit
            continue
        matrices.append(matrix)
        target += resident_bytes(matrix.rows, matrix.columns)
    return matrices, rest


def _tiles_bytes(matrices: list[MatrixPlan]) -> int:
    """Of all, with room up to what comes after them."""
    return aligned(sum(resident_bytes(matrix.rows, matrix.columns) for matrix in matrices))


def _matrix(unit: list[TensorEntry], stripes: int, target: int) -> MatrixPlan | None:
    """The unit as a matrix of the form, None where it is to stay as it is."""
    if any(entry.dtype != "BF16" or len(entry.shape) != 2 for entry in unit):
        return None
    widths = {entry.shape[1] for entry in unit}
    ends = [entry.offset + entry.nbytes for entry in unit]
    if len(widths) > 1 or ends[:-1] != [entry.offset for entry in unit[1:]]:
        return None
    rows, columns = sum(entry.shape[0] for entry in unit), widths.pop()
    panels = max(share_of(entry, stripes, 0, 1).blocks for entry in unit)
    if panels > 1 and (len(unit) > 1 or columns // panels % GROUP_COLUMNS):
        return None
    if not pays(rows, columns):
        return None
    names = tuple(entry.name for entry in unit)
    return MatrixPlan(names, rows, columns, unit[0].offset, panels, target)


def _pieces(manifest: Manifest, matrices: list[MatrixPlan]) -> dict[int, tuple[Piece, ...]]:
    """By chunk."""
    found: dict[int, list[Piece]] = {}
    chunk_bytes = manifest.data.chunk_bytes
    for number, matrix in enumerate(matrices):
        for panel in range(matrix.panels):
            at = matrix.offset + panel * matrix.panel_bytes
            for span, seam in _spans(matrix, at, chunk_bytes):
                index, source = divmod(at + span.begin, chunk_bytes)
                piece = Piece(number, panel, span, source, seam)
                found.setdefault(index, []).append(piece)
    # A matrix's palette is chosen by its first part: better by a long one.
    return {
        index: tuple(sorted(pieces, key=lambda piece: piece.seam is not None))
        for index, pieces in found.items()
    }


def _spans(matrix: MatrixPlan, at: int, chunk_bytes: int) -> Iterator[tuple[Span, Span | None]]:
    """A panel that lies at ``at`` of the image, cut by seams and by chunks, in order."""
    begin = 0
    found: list[tuple[Span, Span | None]] = []
    for seam in seams(matrix, at, chunk_bytes):
        found += [(Span(begin, seam.begin), None), (seam, seam)]
        begin = seam.end
    found.append((Span(begin, matrix.panel_bytes), None))
    for (begin, stop), seam_or_none in found:
        while begin < stop:
            end = min(stop, begin + chunk_bytes - (at + begin) % chunk_bytes)
            yield Span(begin, end), seam_or_none
            begin = end


def seams(matrix: MatrixPlan, at: int, chunk_bytes: int) -> list[Span]:
    """Runs of tiles of a panel that lies at ``at`` of the image which chunks cut, in order."""
    short = min(SHORT_BYTES, chunk_bytes // 4)
    found: list[Span] = []
    for boundary in range(-at % chunk_bytes or chunk_bytes, matrix.panel_bytes, chunk_bytes):
        begin = 0 if boundary < short else boundary // matrix.tile_bytes * matrix.tile_bytes
        end = min(-(-boundary // matrix.tile_bytes) * matrix.tile_bytes, matrix.panel_bytes)
        if matrix.panel_bytes - boundary < short:
            end = matrix.panel_bytes
        if end == begin:
            continue  # between two tiles
        if found and begin < found[-1].end:
            found[-1] = Span(found[-1].begin, max(end, found[-1].end))
        else:
            found.append(Span(begin, end))
    return found
