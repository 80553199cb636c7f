"""How long to wait, and whether the other end of a connection is still there.

Pure: time is an argument, in seconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque

from pop_node.kv_stream.frames import Ping

MIN_WAIT_S = 5.0
"""Shortest wait without progress. Guess: rides out a garbage collection or one lost SYN (3 s)."""

WAIT_RTTS = 20.0
"""Waits in round trips, for links where 5 s would be too few retransmissions. Guess."""

MIN_DIAL_S = 1.0
DIAL_RTTS = 5.0
"""Time for one new connection: TCP, TLS 1.3 and two greetings are four round trips. Guesses."""

PING_INTERVAL_S = 2.0
"""Two pings fit into the shortest wait, so losing one is not death."""

RTT_SAMPLES = 30
"""One minute of pings: the minimum forgets a path that is gone."""


def wait_limit_s(rtt_s: float) -> float:
    """Longest wait without progress on a link with this round-trip time."""
    return max(MIN_WAIT_S, WAIT_RTTS * rtt_s)


def dial_limit_s(rtt_s: float) -> float:
    """Least time for a transfer to go on over a new connection, however long it had waited."""
    return max(MIN_DIAL_S, DIAL_RTTS * rtt_s)


class Keepalive:
    """Pings one connection, measures its round trip, and tells when it has gone silent."""

    def __init__(self, now: float) -> None:
        self._last_heard = now
        self._next_ping = math.inf
        self._nonce = 0
        self._asked_at: float | None = None
        self._rtts: deque[float] = deque(maxlen=RTT_SAMPLES)

    @property
    def rtt_s(self) -> float:
        """Smallest recent round trip; 0 before the first ``Pong``."""
        return min(self._rtts, default=0.0)

    @property
    def has_rtt(self) -> bool:
        """True after the first ``Pong``."""
        return bool(self._rtts)

    def begin(self, now: float) -> None:
        """The peer said ``Hello``: ping from now on."""
        self._next_ping = now

    def heard(self, now: float) -> None:
        """Any bytes arrived: payload that trickles in is a sign of life too."""
        self._last_heard = now

    def pong(self, nonce: int, now: float) -> bool:
        """Take an answer; True when it was to the newest ping and gave a sample."""
        if nonce != self._nonce or self._asked_at is None:
            return False
        self._rtts.append(now - self._asked_at)
        self._asked_at = None
        return True

    def due(self, now: float) -> Ping | None:
        """The ping to send now, if it is time for one."""
        if now < self._next_ping:
            return None
        self._next_ping = now + PING_INTERVAL_S
        self._nonce += 1
        self._asked_at = now
        return Ping(self._nonce)

    def is_dead(self, now: float) -> bool:
        """True when nothing was heard for ``wait_limit_s``."""
        return now >= self._last_heard + wait_limit_s(self.rtt_s)

    def next_deadline(self) -> float:
        """When ``due`` or ``is_dead`` has to be asked again."""
        return min(self._next_ping, self._last_heard + wait_limit_s(self.rtt_s))
