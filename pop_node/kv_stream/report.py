"""Measures one transfer on the prefill node's clock; see ``wire.messages.TransferReport``."""

from __future__ import annotations

from dataclasses import dataclass

from wire.messages import TransferReport


@dataclass(slots=True)
class TransferMeter:
    """Collects the times (s) and bytes of one transfer.

    A byte counts as received when its ``Ack`` came back, less half a round trip. Bytes acknowledged
    while the prefill still computes are hidden by it whatever follows; those acknowledged later are
    hidden when their corrected time is not after its end. ``wire_bytes`` counts data frames
    with their headers, packed or not; control frames and TLS records are left out.
    """

    kv_bytes: int = 0
    wire_bytes: int = 0
    hidden_bytes: int = 0
    compute_start: float | None = None
    compute_end: float | None = None
    first_sent: float | None = None
    last_received: float | None = None

    def compute_started(self, now: float) -> None:
        self.compute_start = now

    def compute_ended(self, now: float) -> None:
        self.compute_end = now

    def sent(self, wire_bytes: int, now: float) -> None:
        """The first byte of a data frame goes out."""
        self.wire_bytes += wire_bytes
        if self.first_sent is None:
            self.first_sent = now

    def acked(self, received_bytes: int, rtt_s: float, now: float) -> None:
        """``received_bytes`` payload bytes in all have arrived."""
        arrived = now - rtt_s / 2
        self.kv_bytes = received_bytes
        self.last_received = arrived
        if self.compute_end is None or arrived <= self.compute_end:
            self.hidden_bytes = received_bytes

    def report(self, rtt_s: float) -> TransferReport:
        """The figures; a time whose two ends were not both seen is 0."""
        return TransferReport(
            kv_bytes=self.kv_bytes,
            wire_bytes=self.wire_bytes,
            hidden_bytes=self.hidden_bytes,
            compute_ms=_span_ms(self.compute_start, self.compute_end),
            transfer_ms=_span_ms(self.first_sent, self.last_received),
            tail_ms=_span_ms(self.compute_end, self.last_received),
            rtt_ms=rtt_s * 1e3,
        )


def _span_ms(start: float | None, end: float | None) -> float:
    if start is None or end is None:
        return 0.0
    return max(0.0, end - start) * 1e3
