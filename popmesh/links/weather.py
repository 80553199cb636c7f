"""What TCP makes of lost packets and jitter: delays, since it repeats and reorders what is missing.

Pure: randomness is an argument. The model, for one piece of ``n`` packets of a connection:

- jitter: each piece takes ``U(0, jitter)`` longer; a connection's pieces still arrive in order.
- loss: with probability ``1 - (1 - loss)^n`` a packet of the piece is lost. The piece, and whatever
  of its connection comes behind it, then waits for the repair: one RTT when at least three more
  packets follow (three duplicate acknowledgements), else a timeout of ``RTT + 200 ms``. Each
  repair is lost again with probability ``loss`` and then waits for a timeout, doubled every time.
- a handshake: each of its two packets may be lost; the first repeat comes after 1 s.

Stalls of one window overlap, as with selective acknowledgement. Congestion control is not modelled:
where the rate matters, lower ``bandwidth_mbps`` too, to about ``MSS / RTT * sqrt(1.5 / loss)`` for
each connection (Mathis et al. 1997).

Sources: fast retransmit RFC 5681; RTO = SRTT + max(G, 4 RTTVAR) RFC 6298, with Linux's floor of
200 ms for the second term and the RFC's 1 s for handshakes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

PACKET_BYTES = 1448
"""Payload of a TCP segment: 1500 byte MTU less headers with timestamps."""

DUPLICATES = 3
"""Packets that must follow a lost one for a repair without a timeout (RFC 5681)."""

RTO_MARGIN_S = 0.2
"""What Linux adds to the smoothed RTT at least (TCP_RTO_MIN)."""

HANDSHAKE_RTO_S = 1.0
"""First timeout of a SYN (RFC 6298, 2.1)."""

MAX_STALL_S = 120.0
"""Linux's TCP_RTO_MAX: no single wait is longer."""


@dataclass(frozen=True, slots=True)
class Weather:
    """The disturbances of one direction; ``rtt_s`` is the pair's."""

    loss: float
    jitter_s: float
    rtt_s: float

    def extra_s(self, nbytes: int, bytes_behind: int, rng: random.Random) -> float:
        """How much longer a piece of ``nbytes`` takes; ``bytes_behind``: of its connection, sent.

        An end without payload is one packet.
        """
        extra_s = rng.uniform(0.0, self.jitter_s) if self.jitter_s else 0.0
        if not self.loss:
            return extra_s
        packets = max(1, math.ceil(nbytes / PACKET_BYTES))
        if rng.random() >= 1.0 - (1.0 - self.loss) ** packets:
            return extra_s
        timeout_s = self.rtt_s + RTO_MARGIN_S
        fast = bytes_behind >= DUPLICATES * PACKET_BYTES
        return extra_s + (self.rtt_s if fast else timeout_s) + self._lost_again_s(timeout_s, rng)

    def handshake_s(self, rng: random.Random) -> float:
        """How much longer a handshake takes; draws for both of its packets."""
        if not self.loss or rng.random() < (1.0 - self.loss) ** 2:
            return 0.0
        return HANDSHAKE_RTO_S + self._lost_again_s(2 * HANDSHAKE_RTO_S, rng)

    def _lost_again_s(self, timeout_s: float, rng: random.Random) -> float:
        total_s = 0.0
        while total_s < MAX_STALL_S and rng.random() < self.loss:
            total_s += timeout_s
            timeout_s = min(2 * timeout_s, MAX_STALL_S)
        return total_s
