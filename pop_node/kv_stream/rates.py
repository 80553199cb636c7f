"""Estimates what a link can carry from the acknowledgements of what was sent over it.

Pure. A link is busy from the first unacknowledged byte until all are acknowledged; over such a
period the spacing of the acknowledgements shows the rate. A prefill that computes more slowly
than the link carries must not make the link look slow, so a period in which the transport never
had to wait can only raise the estimate, as in BBR's treatment of application-limited samples.
Source: N. Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue 14(5), 2016.
"""

from __future__ import annotations

MIN_SAMPLE_BYTES = 512 * 1024
"""Shortest train that gives a sample: two staging slots. Guess; below it timer noise dominates."""

MAX_SAMPLE_S = 1.0
"""Longer busy periods are cut, so that a long transfer keeps the estimate fresh."""

GAIN = 0.5
"""Weight of a new link-limited sample: two samples forget three quarters of the past. Guess."""

MEMORY_S = 60.0
"""Without a sample for so long the rate is unknown again. Routers avoid a link that was slow, so
nothing else would ever show that it has recovered. Guess: far longer than the pauses between
requests of a link in use, and one slow hand-over a minute is cheap."""


class RateMeter:
    """Measured rate of one link. ``bytes_per_s`` is the last estimate, of KV; 0 until then.

    Pieces count as what they are unpacked, so a link that carries them packed is faster by that: it
    is what a hand-over over it takes, which is what routers price."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self._sampled_at = 0.0
        self._unacked: dict[bytes, int] = {}
        self._acked: dict[bytes, int] = {}
        self._first_ack: float | None = None
        self._bytes = 0  # acknowledged since the first acknowledgement of the period
        self._waited = False
        self._limited_at: float | None = None

    def limit(self, now: float) -> float:
        """``current`` where the link, not the prefill, set the pace of late; 0 otherwise.

        The busy period under way counts as soon as it is long enough for a sample.
        """
        if self._limited_at is not None and now - self._limited_at <= MEMORY_S:
            return self.current(now)
        first = self._first_ack
        if self._waited and first is not None and first < now and self._bytes >= MIN_SAMPLE_BYTES:
            return self._bytes / (now - first)
        return 0.0

    def current(self, now: float) -> float:
        """The estimate in bytes per second, 0 if there is none or it is older than ``MEMORY_S``."""
        return self.bytes_per_s if now - self._sampled_at <= MEMORY_S else 0.0

    def sent(self, transfer: bytes, nbytes: int) -> None:
        """Bytes of a transfer's KV went to the transport."""
        self._unacked[transfer] = self._unacked.get(transfer, 0) + nbytes

    def waited(self) -> None:
        """The transport was full: the link, not the prefill, sets the pace."""
        self._waited = True

    def acked(self, transfer: bytes, received_bytes: int, now: float) -> None:
        """The peer has ``received_bytes`` bytes of the transfer in all."""
        fresh = received_bytes - self._acked.get(transfer, 0)
        if fresh <= 0 or transfer not in self._unacked:
            return
        self._acked[transfer] = received_bytes
        self._unacked[transfer] -= fresh
        if self._first_ack is None:
            self._first_ack = now
        else:
            self._bytes += fresh
        idle = not any(self._unacked.values())
        if idle or now - self._first_ack >= MAX_SAMPLE_S:
            self._sample(now)

    def ended(self, transfer: bytes) -> None:
        """The transfer is over; what it had in flight counts no more."""
        self._unacked.pop(transfer, None)
        self._acked.pop(transfer, None)

    def _sample(self, now: float) -> None:
        first, nbytes, waited = self._first_ack, self._bytes, self._waited
        self._first_ack, self._bytes, self._waited = None, 0, False
        if first is None or now <= first or nbytes < MIN_SAMPLE_BYTES:
            return
        if waited:
            self._limited_at = now
        rate, before = nbytes / (now - first), self.current(now)
        if waited and before:
            self.bytes_per_s = before + GAIN * (rate - before)
        else:
            self.bytes_per_s = max(before, rate)
        self._sampled_at = now
