"""What packing made of each kind of tensor: pure arithmetic over a manifest and its pieces."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pop_node.store.dtypes import storage
from pop_node.store.manifest import Manifest
from pop_node.store.packing import PackedPiece

_CLASSES = (
    ("embed", "embedding"),
    ("lm_head", "head"),
    ("norm", "norm"),
    ("self_attn", "attention"),
    ("mlp", "mlp"),
)
"""A part of a name in Hugging Face's naming -> the class, the first that fits: norms lie within
attention in some families."""


@dataclass(frozen=True, slots=True)
class ClassRow:
    """All tensors of a class. Of a piece that holds several classes, or padding between
    tensors, each has its part by bytes.

    ``limit_bytes``: see ``PackedPiece``; ``raw``: bytes stored as they are, by reason.
    """

    name: str
    num_tensors: int
    num_weights: int
    decoded_bytes: int
    stored_bytes: float
    limit_bytes: float
    raw: dict[str, int]

    @property
    def bits_per_weight(self) -> float:
        """After packing; 0 without weights."""
        return 8 * self.stored_bytes / self.num_weights if self.num_weights else 0.0

    @property
    def limit_bits_per_weight(self) -> float:
        """That the entropy allows; 0 without weights."""
        return 8 * self.limit_bytes / self.num_weights if self.num_weights else 0.0


def tensor_class(name: str) -> str:
    """What a tensor is for."""
    return next((kind for part, kind in _CLASSES if part in name), "other")


def class_rows(manifest: Manifest, pieces: Sequence[PackedPiece]) -> list[ClassRow]:
    """A row per class, the largest first; ``pieces`` are all of the image, in order."""
    counts: dict[str, tuple[int, int, int]] = {}
    for entry in manifest.tensors:
        tensors, weights, nbytes = counts.get(tensor_class(entry.name), (0, 0, 0))
        weights += entry.nbytes // storage(entry.dtype).itemsize
        counts[tensor_class(entry.name)] = (tensors + 1, weights, nbytes + entry.nbytes)
    stored, limits = dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0.0)
    raw: dict[str, dict[str, int]] = {kind: {} for kind in counts}
    for kind, index, nbytes in _parts(manifest, pieces):
        piece = pieces[index]
        part = nbytes / piece.decoded_bytes
        stored[kind] += part * piece.stored_bytes
        limits[kind] += part * piece.limit_bytes
        if piece.reason:
            raw[kind][piece.reason] = raw[kind].get(piece.reason, 0) + nbytes
    rows = [ClassRow(kind, *counts[kind], stored[kind], limits[kind], raw[kind]) for kind in counts]
    return sorted(rows, key=lambda row: (-row.decoded_bytes, row.name))


def _parts(manifest: Manifest, pieces: Sequence[PackedPiece]) -> Iterator[tuple[str, int, int]]:
    """(class, piece, bytes) of each tensor's part of each piece."""
    begins = [piece.offset for piece in pieces]
    for entry in manifest.tensors:
        kind, at, end = tensor_class(entry.name), entry.offset, entry.offset + entry.nbytes
        index = bisect.bisect_right(begins, at) - 1
        while at < end:
            stop = min(end, pieces[index].offset + pieces[index].decoded_bytes)
            yield kind, index, stop - at
            at, index = stop, index + 1
