"""How fast bytes have passed lately."""

from __future__ import annotations

import math

MEMORY_S = 2.0
"""Guess: what passed so long ago counts for a third; a steady stream is known after a few of it."""


class RateMeter:
    """Bytes per second with an exponentially fading memory. Knows no clock."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._at = 0.0

    def add(self, nbytes: int, now: float) -> None:
        """So many have just passed; ``now`` never goes back."""
        self._rate = self.rate(now) + nbytes / MEMORY_S
        self._at = now

    def rate(self, now: float) -> float:
        """Bytes per second."""
        return self._rate * math.exp((self._at - now) / MEMORY_S)
