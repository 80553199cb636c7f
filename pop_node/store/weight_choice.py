"""Which matrices of a model are kept in the resident form where that was left open: pure choice.

What was measured of a matrix shape decides: times of a step of the model with all of its matrices
plain and with those of the shape resident, by rows of the step. An answer spends most of its steps
on few rows, a prompt is one step of many: decode counts for ``DECODE_SHARE``, prefill for the rest,
each bucket of them alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import msgspec

Shape = tuple[int, int]

DECODE_ROWS = (1, 2, 4, 8, 16)
PREFILL_ROWS = (32, 128, 512)
"""Buckets: 512 is the token budget of a step."""

DECODE_SHARE = 0.75
"""Guess: a chat's prompts are mostly cached, and its answers are what people wait for."""

WORST = 0.96
"""A shape stays plain that takes more speed from a step of any bucket, whatever it wins in others:
medians of pairs of the same steps differ by 2 % from one minute to the next (measured)."""


class Timing(msgspec.Struct, frozen=True):
    """Microseconds of a step of ``rows`` rows, with all matrices plain and with those of a shape
    resident."""

    rows: int
    plain_us: float
    resident_us: float

    @property
    def speedup(self) -> float:
        """Plain / resident."""
        return self.plain_us / self.resident_us


class ShapeTimings(msgspec.Struct, frozen=True):
    """Of a model with ``count`` matrices of ``shape``, [out, in]."""

    shape: Shape
    count: int
    timings: tuple[Timing, ...]


def gain(timings: Iterable[Timing]) -> float:
    """How many times as fast resident weights are: the weighted geometric mean over buckets, of
    those that were measured; 1 without any."""
    found = list(timings)
    total = weighted = 0.0
    for rows, share in ((DECODE_ROWS, DECODE_SHARE), (PREFILL_ROWS, 1 - DECODE_SHARE)):
        logs = [math.log(one.speedup) for one in found if one.rows in rows]
        if logs:
            weighted += share * sum(logs) / len(logs)
            total += share
    return math.exp(weighted / total) if total else 1.0


def pays_on(timings: Collection[Timing]) -> bool:
    """Whether matrices that were measured so are kept resident."""
    return gain(timings) > 1 and min(one.speedup for one in timings) >= WORST


def plain_shapes(shapes: Iterable[ShapeTimings]) -> frozenset[Shape]:
    """Shapes whose matrices stay plain."""
    return frozenset(one.shape for one in shapes if not pays_on(one.timings))
