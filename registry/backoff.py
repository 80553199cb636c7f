"""How long to wait after the n-th failure in a row."""

from __future__ import annotations

BASE_S = 0.1
"""Pause after the first failure. Guess: a restarting registry is worth asking again soon."""

CAP_S = 5.0
"""Longest pause. Guess: half of a node's default TTL, so that a registry's return is noticed
before anything expires there."""


def backoff_s(failures: int, jitter: float) -> float:
    """Seconds to wait after ``failures`` >= 1 failures in a row; ``jitter`` is uniform in [0, 1).

    Doubles from ``BASE_S`` to ``CAP_S``; the jitter takes off up to half, so that the many clients
    of one registry do not come back in step.
    """
    doublings = min(failures - 1, 16)  # beyond it the cap holds anyway
    return min(CAP_S, BASE_S * 2.0**doublings) * (1.0 - jitter / 2)
