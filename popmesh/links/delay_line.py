"""One direction of one link: how long bytes take to get through.

Pure: time is an argument. A link first *serialises* (bytes leave one after the other at its rate),
then *propagates* (every byte takes the one-way delay). ``popmesh.links.fair_queue`` decides whose
bytes go first; sockets and timers belong to ``popmesh.links.shaper``.
"""

from __future__ import annotations

SLACK_BUFFER_BYTES = 256 * 1024
"""Buffer of a connection beyond what is in flight: keeps the link busy between two timer ticks."""

MAX_PIECE_BYTES = 16 * 1024
MIN_PIECE_BYTES = 1448
PIECE_S = 0.0013
"""Bytes enter a line in pieces, so that flows alternate on a slow one: what it carries in about one
timer tick, from one packet up to 16 KiB (100 Mbit/s), above which smaller pieces would cost more
Python than they save waiting. Guess."""

MAX_BUFFER_BYTES = 256 * 1024 * 1024
"""Largest buffer of a connection: 10 Gbit/s at 200 ms, the widest link worth emulating here."""


class DelayLine:
    """Serialisation and propagation in one direction; arrivals keep the order of ``push``."""

    def __init__(self, rate_bytes_per_s: float, delay_s: float) -> None:
        self.free_at = 0.0
        self._last_arrival = 0.0
        self.configure(rate_bytes_per_s, delay_s)

    def configure(self, rate_bytes_per_s: float, delay_s: float) -> None:
        """Change rate and one-way delay for bytes pushed from now on; raises ``ValueError``."""
        if rate_bytes_per_s <= 0 or delay_s < 0:
            raise ValueError(f"impossible link: {rate_bytes_per_s} B/s, {delay_s} s")
        self.rate_bytes_per_s = rate_bytes_per_s
        self.delay_s = delay_s

    def push(self, now: float, nbytes: int) -> float:
        """Send ``nbytes`` that are there since ``now``; returns when the last one arrives, in s.

        ``now`` may lie before earlier calls' (a late timer): the line was idle then, not lost.
        """
        start = max(now, self.free_at)
        self.free_at = start + nbytes / self.rate_bytes_per_s
        # A shortened delay must not let later bytes overtake earlier ones.
        self._last_arrival = max(self.free_at + self.delay_s, self._last_arrival)
        return self._last_arrival

    def hold(self, now: float) -> None:
        """The line carried nothing until ``now``: what waits has no claim on the time before."""
        self.free_at = max(self.free_at, now)

    @property
    def piece_bytes(self) -> int:
        """Into how large pieces bytes are cut."""
        piece = int(self.rate_bytes_per_s * PIECE_S)
        return min(max(piece, MIN_PIECE_BYTES), MAX_PIECE_BYTES)

    @property
    def buffer_bytes(self) -> int:
        """What one connection may hold in this direction: bandwidth times RTT and some slack.

        Half of the product is in flight at full rate; the rest waits, as in a sender's window.
        """
        product = int(self.rate_bytes_per_s * 2 * self.delay_s)
        return min(product + SLACK_BUFFER_BYTES, MAX_BUFFER_BYTES)
