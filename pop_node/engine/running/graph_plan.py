"""Which decode steps are captured as graphs, and in which order: pure arithmetic over sizes.

A graph repeats launches whose grids are fixed, so a step runs in the smallest *bucket* that holds
it: padded to the bucket's rows, with the keys of a sequence split as for the bucket's context.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container
from dataclasses import dataclass

SMALL_ROWS = (1, 2, 4, 8)
ROW_STEP = 16
"""Further buckets are multiples of it. Up to about 200 rows a product waits for its weights, so a
row of padding costs little more than its share of the activations. Guess."""

MIN_CONTEXT = 1024
"""Shorter contexts share a bucket: they give four splits of 256 keys at most. Contexts double from
there, so that half of the splits or more have keys. Guess."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Up to ``rows`` sequences that decode a token each, with up to ``context`` tokens then."""

    rows: int
    context: int


class GraphPlan:
    """The buckets of an engine with ``max_rows`` sequences of up to ``context_tokens`` tokens."""

    def __init__(self, max_rows: int, context_tokens: int) -> None:
        wide = range(ROW_STEP, max_rows + 1, ROW_STEP)
        self._rows = sorted({n for n in (*SMALL_ROWS, *wide) if n < max_rows} | {max_rows})
        contexts = []
        context = MIN_CONTEXT
        while context < context_tokens:
            contexts.append(context)
            context *= 2
        self._contexts = [*contexts, context_tokens]

    def bucket(self, rows: int, longest: int) -> Bucket | None:
        """The smallest that holds ``rows`` sequences of up to ``longest`` tokens, if one does."""
        if rows > self._rows[-1] or longest > self._contexts[-1]:
            return None
        return Bucket(
            self._rows[bisect_left(self._rows, rows)],
            self._contexts[bisect_left(self._contexts, longest)],
        )

    def first(self) -> list[Bucket]:
        """Those to capture before the engine is ready: one sequence, and all of them. They take
        both forms of the attention kernel, with splits and without, so that later captures wait for
        a compiler only where they merge another number of splits."""
        context = self._contexts[0]
        return [Bucket(rows, context) for rows in sorted({self._rows[0], self._rows[-1]})]

    def missing(self, captured: Container[Bucket]) -> Bucket | None:
        """The next to capture while nothing is to be computed: short contexts first, few rows
        first, because most steps are like that."""
        for context in self._contexts:
            for rows in self._rows:
                bucket = Bucket(rows, context)
                if bucket not in captured:
                    return bucket
        return None
