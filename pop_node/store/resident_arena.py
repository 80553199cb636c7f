"""Where a model ends up on the CPU with its matrices in the resident form, packed as they arrive.

A chunk is read into the buffer of its lane and what is whole of it is packed from there, while it
is in the processor's cache, to where it stays: the model is never there in both forms. Beyond the
form and the buffers there are the seams between chunks under way, some tiles each.
"""

from __future__ import annotations

import threading
from ctypes import pointer
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kernels.native.resident_parts import Keys, Palette, Part, PartPacker
from kernels.resident_layout import (
    ESCAPE_SHARE,
    GROUP_BYTES,
    GROUP_COLUMNS,
    escape_room,
    resident_bytes,
    tile_count,
)
from pop_node.store.host_arena import copy_moves, touch_ahead
from pop_node.store.host_memory import aligned_memory, forget
from pop_node.store.load_plan import ChunkPlan, LoadPlan
from pop_node.store.resident_plan import (
    WEIGHT_BYTES,
    Piece,
    ResidentPlan,
    Span,
)
from pop_node.store.spare_memory import SpareMemory


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """The parts of a ``kernels.resident.ResidentMatrix`` as arrays, ``tiles`` flat."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    palette: NDArray[np.uint8]
    tiles: NDArray[np.uint8]
    starts: NDArray[np.int32]
    escapes: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ResidentMemory:
    """``placed``: memory of what stays as it is, and the plan that it follows. ``misfits``: names
    of tensors in matrices with more escapes than the form has room for; nothing of them is here."""

    placed: tuple[tuple[LoadPlan, NDArray[np.uint8]], ...]
    matrices: tuple[PackedMatrix, ...]
    misfits: frozenset[str]


@dataclass(slots=True)
class _Filling:
    """What is known of a matrix so far; ``keys`` is None once there are too many."""

    num_keys: int = 0
    keys: list[Keys] | None = field(default_factory=list)


@dataclass(slots=True)
class _Seam:
    data: NDArray[np.uint8]
    missing_bytes: int


_Work = tuple[int, Part]
"""A part, and the number of its matrix."""


class ResidentArena:
    """See ``loader.Arena``. The memory lives as long as an array or tensor that views it."""

    phase = "pack"

    def __init__(
        self,
        plan: ResidentPlan,
        lanes: int,
        chunk_bytes: int,
        packer: PartPacker,
        spare: SpareMemory | None = None,
    ) -> None:
        """Takes memory from ``spare`` where there is any. Raises ``ConfigError`` without room."""
        self.memory: ResidentMemory | None = None
        """Is there once ``finish`` has returned."""
        self._plan = plan
        self._packer = packer
        nbytes = plan.tiles_bytes + plan.arena_bytes
        self._whole = aligned_memory(nbytes) if spare is None else spare.take(nbytes)
        self._tiles, self._plain = np.split(self._whole, [plan.tiles_bytes])
        self._buffers = [aligned_memory(chunk_bytes) for _ in range(lanes)]
        room = chunk_bytes // WEIGHT_BYTES // ESCAPE_SHARE
        self._rooms: list[Keys] = [np.empty(room, np.uint64) for _ in range(lanes)]
        self._palettes = (Palette * len(plan.matrices))()
        self._filling = [_Filling() for _ in plan.matrices]
        self._seams: dict[tuple[int, int, int], _Seam] = {}
        self._lock = threading.Lock()

    def prepare(self, stop: threading.Event) -> None:
        """Touch the memory ahead of what is packed into it."""
        touch_ahead(self._whole, 0, stop)

    def landing(self, lane: int, chunk: ChunkPlan) -> memoryview:
        """The lane's own buffer."""
        return memoryview(self._buffers[lane].data)[: chunk.nbytes]

    def decode(self, lane: int, chunk: ChunkPlan, stored: memoryview) -> None:
        """To the lane's own buffer; what is whole there is packed while the rest is decoded."""
        work = self._whole_tiles(lane, chunk)
        blocks = np.frombuffer(stored, np.uint8)
        out = self._buffers[lane][: chunk.nbytes]
        parts = [part for _, part in work]
        self._note(work, self._packer.decode(blocks, out, parts, self._rooms[lane]))
        self._pack_and_move(lane, chunk, [])

    def place(self, lane: int, chunk: ChunkPlan) -> int:
        """Pack or move a verified chunk out of its buffer; returns the bytes of it."""
        self._pack_and_move(lane, chunk, self._whole_tiles(lane, chunk))
        return chunk.nbytes

    def finish(self) -> None:
        """Put the matrices together, and give back what misfits have had."""
        # What came of a misfit after it was one is in no seam.
        needed = [number for number, _, _ in self._seams if self._filling[number].keys is not None]
        assert not needed, "a seam did not arrive as a whole"
        misfits: list[str] = []
        matrices = []
        pairs = zip(self._plan.matrices, self._filling, strict=True)
        for number, (plan, filling) in enumerate(pairs):
            if filling.keys is not None:
                matrices.append(self._matrix(number, filling.keys))
                continue
            nbytes = resident_bytes(plan.rows, plan.columns)
            forget(self._tiles.ctypes.data + plan.target, nbytes)
            misfits += plan.names
        placed = ((self._plan, self._plain),)
        self.memory = ResidentMemory(placed, tuple(matrices), frozenset(misfits))

    def _whole_tiles(self, lane: int, chunk: ChunkPlan) -> list[_Work]:
        """What can be packed of a chunk without others."""
        return [
            (piece.matrix, self._part(piece, piece.span.begin, self._bytes_of(piece, lane)))
            for piece in self._plan.pieces.get(chunk.index, ())
            if piece.seam is None and self._filling[piece.matrix].keys is not None
        ]

    def _pack_and_move(self, lane: int, chunk: ChunkPlan, work: list[_Work]) -> None:
        """Pack ``work`` and the seams that a chunk completes, and move what is to stay as it is."""
        joined = []  # which have to live until they are packed
        for piece in self._plan.pieces.get(chunk.index, ()):
            if piece.seam is None or self._filling[piece.matrix].keys is None:
                continue
            seam = self._join(piece, piece.seam, self._bytes_of(piece, lane).data)
            if seam is not None:
                work.append((piece.matrix, self._part(piece, piece.seam.begin, seam)))
                joined.append(seam)
        if work:
            self._note(work, self._packer.pack([part for _, part in work], self._rooms[lane]))
        copy_moves(self._buffers[lane], self._plain, chunk.moves)

    def _bytes_of(self, piece: Piece, lane: int) -> NDArray[np.uint8]:
        nbytes = piece.span.end - piece.span.begin
        return self._buffers[lane][piece.source : piece.source + nbytes]

    def _part(self, piece: Piece, begin: int, data: NDArray[np.uint8]) -> Part:
        """Whole tiles of the panel of ``piece`` in ``data``, from byte ``begin`` of it on."""
        plan = self._plan.matrices[piece.matrix]
        tile = begin // plan.tile_bytes
        group = piece.panel * plan.width // GROUP_COLUMNS
        at = plan.target + tile * plan.stored_tile_bytes + group * GROUP_BYTES
        return Part(
            rows=data.ctypes.data,
            N=len(data) // (plan.width * WEIGHT_BYTES),
            K=plan.width,
            ld=plan.width,
            tiles=self._tiles.ctypes.data + at,
            tile_bytes=plan.stored_tile_bytes,
            tile=tile,
            group=group,
            palette=pointer(self._palettes[piece.matrix]),
        )

    def _join(self, piece: Piece, span: Span, data: memoryview) -> NDArray[np.uint8] | None:
        """Put a part of a seam to the others; all of it, if it was the last."""
        key = (piece.matrix, piece.panel, span.begin)
        begin, end = piece.span.begin - span.begin, piece.span.end - span.begin
        with self._lock:
            seam = self._seams.get(key)
            if seam is None:
                nbytes = span.end - span.begin
                seam = self._seams[key] = _Seam(np.empty(nbytes, np.uint8), nbytes)
            # Not by numpy, which lets other threads run meanwhile, who may want the lock.
            seam.data.data[begin:end] = data
            seam.missing_bytes -= end - begin
            return None if seam.missing_bytes else self._seams.pop(key).data

    def _note(self, work: list[_Work], found: list[Keys]) -> None:
        """Keep the escapes of parts, as long as there is room for those of their matrix."""
        for (number, _), keys in zip(work, found, strict=True):
            if not len(keys):
                continue
            plan, filling = self._plan.matrices[number], self._filling[number]
            kept = keys.copy()
            with self._lock:
                filling.num_keys += len(kept)
                if filling.num_keys > escape_room(plan.rows, plan.columns):
                    filling.keys = None
                elif filling.keys is not None:
                    filling.keys.append(kept)

    def _matrix(self, number: int, found: list[Keys]) -> PackedMatrix:
        plan = self._plan.matrices[number]
        keys = np.sort(np.concatenate(found)) if found else np.empty(0, np.uint64)
        starts = np.zeros(tile_count(plan.rows) + 1, np.int32)
        counts = np.bincount((keys >> 32).astype(np.int64), minlength=len(starts) - 1)
        np.cumsum(counts, out=starts[1:])
        end = plan.target + resident_bytes(plan.rows, plan.columns)
        return PackedMatrix(
            names=plan.names,
            shape=(plan.rows, plan.columns),
            palette=np.array(self._palettes[number].exponents, np.uint8),
            tiles=self._tiles[plan.target : end],
            starts=starts,
            escapes=keys.astype(np.uint32).view(np.int32),
        )
