"""Gaps and pauses in figures. Pure.

A *gap* is each wait for text: from the request to its first text, and between texts. A *pause* is
the longest gap of an answer that a fault touched, among the gaps during which that fault was there.
A fault touched an answer that needed more than one attempt or lost its connection, and one that
stood still for a second while a node that served it was the victim. Quantiles are by nearest rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from popmesh.drill.observation import Observation

SHOWN_GAP_S = 0.25
"""Gaps from here on are drawn and listed. Guess: what a reader notices."""


class Quantiles(msgspec.Struct, frozen=True):
    """Of ``count`` lengths of time, in seconds; all 0 when there are none."""

    count: int
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float


STOOD_STILL_S = 1.0
"""No load explains a gap so long in an answer whose node is the victim of a fault. Guess: several
times the longest gaps of undisturbed answers on two busy cores."""

BUFFERED_S = 0.2
"""Text that left before the blow comes so much after it: a round trip across an ocean."""


@dataclass(frozen=True, slots=True)
class FaultSpan:
    """When a fault was there, on the drill's clock, and whom it hit."""

    number: int
    victim: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """The longest wait of one answer under one fault."""

    fault: int
    start_s: float
    length_s: float


def quantiles(lengths_s: Iterable[float]) -> Quantiles:
    """p is the smallest value that at least p of all values do not exceed."""
    ordered = sorted(lengths_s)
    if not ordered:
        return Quantiles(0, 0.0, 0.0, 0.0, 0.0)

    def rank(share: float) -> float:
        return ordered[max(math.ceil(share * len(ordered)), 1) - 1]

    return Quantiles(len(ordered), rank(0.5), rank(0.9), rank(0.99), ordered[-1])


def pause_of(seen: Observation, faults: Sequence[FaultSpan]) -> Pause | None:
    """The answer's pause; None if it was not touched.

    It is laid to the newest fault that was there when it began, else to the first that came.
    """
    moved = seen.attempts > 1 or bool(seen.losses)
    found: Pause | None = None
    times = [seen.started_s, *seen.arrivals, seen.ended_s]
    for start, end in itertools.pairwise(times):
        over = [
            fault
            for fault in faults
            if fault.start_s <= end
            and start <= fault.end_s
            and (moved or (fault.victim in seen.nodes and end - start >= STOOD_STILL_S))
        ]
        if over and (found is None or end - start > found.length_s):
            begun = [fault for fault in over if fault.start_s <= start + BUFFERED_S]
            cause = max(begun, key=_start) if begun else min(over, key=_start)
            found = Pause(cause.number, start, end - start)
    return found


def _start(fault: FaultSpan) -> float:
    return fault.start_s
