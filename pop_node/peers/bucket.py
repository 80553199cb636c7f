"""How fast a node gives: one account for all who take, so that their number does not matter."""

from __future__ import annotations


class TokenBucket:
    """Lets ``rate`` bytes per second pass, and up to ``burst_s`` seconds' worth at once.

    Kept as the moment at which everything taken so far is paid for (the generic cell rate
    algorithm), so that the rate may differ from call to call. Knows no clock.
    """

    def __init__(self, burst_s: float) -> None:
        self._burst_s = burst_s
        self._paid_at = float("-inf")

    def take(self, nbytes: int, now: float, rate_bytes_per_s: float) -> float:
        """Seconds to wait before ``nbytes`` may pass; they are taken either way."""
        begin = max(self._paid_at, now - self._burst_s)
        self._paid_at = begin + nbytes / rate_bytes_per_s
        return max(0.0, self._paid_at - now)
