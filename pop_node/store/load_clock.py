"""When each phase of a load took place, over all threads that take part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter


@dataclass(frozen=True, slots=True)
class Phase:
    """``wall_s``: while at least one thread was at it (phases overlap); ``nbytes`` went through.

    ``began`` and ``ended`` are moments of the monotonic clock.
    """

    wall_s: float
    nbytes: int
    began: float
    ended: float


class LoadClock:
    """Collects when each thread was in which phase (appending to a list is atomic)."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, float, float, int]] = []

    def add(self, phase: str, began: float, nbytes: int) -> None:
        """It ends now."""
        self._spans.append((phase, began, time.monotonic(), nbytes))

    @contextmanager
    def phase(self, name: str, nbytes: int) -> Iterator[None]:
        """What is done inside, if it succeeds."""
        began = time.monotonic()
        yield
        self.add(name, began, nbytes)

    def phases(self) -> dict[str, Phase]:
        """Those through which bytes went, by their beginning."""
        by_name: dict[str, list[tuple[float, float, int]]] = {}
        for name, began, ended, nbytes in sorted(self._spans, key=itemgetter(1)):
            by_name.setdefault(name, []).append((began, ended, nbytes))
        found = {}
        for name, spans in by_name.items():
            total = sum(nbytes for _, _, nbytes in spans)
            if total:
                wall_s = covered([(began, ended) for began, ended, _ in spans])
                ended = max(ended for _, ended, _ in spans)
                found[name] = Phase(wall_s, total, spans[0][0], ended)
        return found


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their beginning."""
    total, until = 0.0, float("-inf")
    for began, ended in spans:
        if ended > until:
            total += ended - max(began, until)
            until = ended
    return total
