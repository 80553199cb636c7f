"""Which tokens of which layers have arrived, per group and component.

Pure interval arithmetic. A group of kind ``tokens`` needs every token, ``window(W)`` only the last
W, and ``state`` only the snapshot after the last token, which counts as that token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pop_node.kv_stream.spec import KvGroup, KvSpec, Piece


def required_tokens(group: KvGroup, have_tokens: int, total_tokens: int) -> tuple[int, int]:
    """Token range ``[lo, hi)`` that must be sent of one group; empty when lo >= hi.

    ``have_tokens`` at the beginning are already there; the sequence has ``total_tokens``.
    """
    match group.kind:
        case "tokens":
            return have_tokens, total_tokens
        case "window":
            window = total_tokens if group.window is None else group.window
            return max(have_tokens, total_tokens - window), total_tokens
        case "state":
            return max(have_tokens, total_tokens - 1), total_tokens


def validate_piece(spec: KvSpec, piece: Piece) -> str | None:
    """What is wrong with a piece under this spec, in words; None when it is a proper box."""
    if piece.group >= len(spec.groups):
        return f"group {piece.group} of {len(spec.groups)}"
    group = spec.groups[piece.group]
    if piece.component >= len(group.components):
        return f"component {piece.component} of {len(group.components)}"
    if not 0 <= piece.layer_lo < piece.layer_hi <= len(group.layers):
        return f"layers [{piece.layer_lo}, {piece.layer_hi}) of {len(group.layers)}"
    if not 0 <= piece.token_lo < piece.token_hi:
        return f"tokens [{piece.token_lo}, {piece.token_hi})"
    return None


@dataclass(slots=True)
class IntervalSet:
    """Disjoint, sorted, never touching half-open intervals of integers."""

    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def overlaps(self, lo: int, hi: int) -> bool:
        """True when any integer of ``[lo, hi)`` is in the set."""
        at = bisect_left(self.ends, lo + 1)  # first interval that ends after lo
        return at < len(self.starts) and self.starts[at] < hi

    def add(self, lo: int, hi: int) -> None:
        """Insert ``[lo, hi)``, which must not overlap; neighbours that touch become one."""
        at = bisect_left(self.ends, lo)  # first interval that ends at or after lo
        upto = at
        while upto < len(self.starts) and self.starts[upto] <= hi:
            lo, hi = min(lo, self.starts[upto]), max(hi, self.ends[upto])
            upto += 1
        self.starts[at:upto] = [lo]
        self.ends[at:upto] = [hi]

    def end_of_run(self, lo: int) -> int:
        """First integer from ``lo`` on that is not in the set."""
        at = bisect_left(self.ends, lo + 1)
        inside = at < len(self.starts) and self.starts[at] <= lo
        return self.ends[at] if inside else lo

    def keep(self, lo: int, hi: int) -> None:
        """Leave only what lies in ``[lo, hi)``."""
        kept = [
            (max(start, lo), min(end, hi))
            for start, end in zip(self.starts, self.ends, strict=True)
            if start < hi and end > lo
        ]
        self.starts[:] = [start for start, _ in kept]
        self.ends[:] = [end for _, end in kept]

    def gaps(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """The parts of ``[lo, hi)`` that are not in the set, in order."""
        found: list[tuple[int, int]] = []
        for start, end in zip(self.starts, self.ends, strict=True):
            if end <= lo:
                continue
            if start >= hi:
                break
            if start > lo:
                found.append((lo, start))
            lo = max(lo, end)
        if lo < hi:
            found.append((lo, hi))
        return found


class Coverage:
    """The pieces of one transfer seen so far."""

    def __init__(self, spec: KvSpec) -> None:
        self._spec = spec
        self._sets = [
            [[IntervalSet() for _ in group.layers] for _ in group.components]
            for group in spec.groups
        ]

    def overlaps(self, piece: Piece) -> bool:
        """True when any token of any layer of the piece was added before."""
        layers = self._sets[piece.group][piece.component][piece.layer_lo : piece.layer_hi]
        return any(layer.overlaps(piece.token_lo, piece.token_hi) for layer in layers)

    def add(self, piece: Piece) -> None:
        """Add a valid piece that does not overlap."""
        for layer in self._sets[piece.group][piece.component][piece.layer_lo : piece.layer_hi]:
            layer.add(piece.token_lo, piece.token_hi)

    def missing(self, have_tokens: int, total_tokens: int) -> list[Piece]:
        """One-layer pieces that are still needed, in (group, component, layer, token) order."""
        found: list[Piece] = []
        for g, group in enumerate(self._spec.groups):
            lo, hi = required_tokens(group, have_tokens, total_tokens)
            for c, layers in enumerate(self._sets[g]):
                for at, layer in enumerate(layers):
                    found += [Piece(g, c, at, at + 1, *gap) for gap in layer.gaps(lo, hi)]
        return found

    def contiguous(self, have_tokens: int) -> list[int]:
        """Per group, component and layer: how many tokens at the beginning are there without a
        hole, counting ``have_tokens`` that need not come."""
        return [layer.end_of_run(have_tokens) for layer in self._layers()]

    def beginning(self, have_tokens: int, counts: Sequence[int]) -> Coverage | None:
        """The part of this from ``have_tokens`` up to ``counts``, as ``contiguous`` orders them;
        None when they claim more than is here, or are not of the spec's shape."""
        part = Coverage(self._spec)
        if len(counts) != self._spec.places:
            return None
        at = iter(counts)
        for mine, theirs in zip(self._layers(), part._layers(), strict=True):
            upto = next(at)
            if upto < have_tokens or upto > mine.end_of_run(have_tokens):
                return None
            if upto > have_tokens:
                theirs.add(have_tokens, upto)
        return part

    def nbytes(self) -> int:
        """Bytes of all pieces here."""
        components = [
            c for group in self._spec.groups for c in group.components for _ in group.layers
        ]
        return sum(
            component.token_bytes * (sum(layer.ends) - sum(layer.starts))
            for component, layer in zip(components, self._layers(), strict=True)
        )

    def trim(self, have_tokens: int) -> None:
        """Forget what lies behind a hole: it will be sent again."""
        for layer in self._layers():
            layer.keep(have_tokens, layer.end_of_run(have_tokens))

    def complete(self, have_tokens: int, total_tokens: int) -> bool:
        """True when nothing is missing."""
        return not self.missing(have_tokens, total_tokens)

    def _layers(self) -> Iterator[IntervalSet]:
        return (layer for components in self._sets for layers in components for layer in layers)
