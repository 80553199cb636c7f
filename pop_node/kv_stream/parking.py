"""Transfers that the decode node does not know: those that come early, those that are over."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from pop_node.kv_stream.frames import Open

PARK_S = 2.0
"""How long an ``Open`` waits for our own ``Submit``: both left the router at the same time."""

MAX_PARKED = 256
"""Parked ``Open`` frames of all peers; guess, more than the submits of 2 s on one node."""

MAX_CLOSED = 4096
"""Ended transfers remembered, so that a late ``Open`` is refused instead of parked."""


@dataclass(frozen=True, slots=True)
class Parked:
    """An ``Open`` that came before its decode leg."""

    open: Open
    conn: int
    peer: str
    until: float


class Parking:
    """Opens that wait for their decode leg, and the ends of transfers past."""

    def __init__(self) -> None:
        self._parked: dict[bytes, Parked] = {}
        self._closed: OrderedDict[bytes, int] = OrderedDict()  # transfer -> attempt

    def __len__(self) -> int:
        return len(self._parked)

    @property
    def is_full(self) -> bool:
        return len(self._parked) >= MAX_PARKED

    def get(self, transfer: bytes) -> Parked | None:
        return self._parked.get(transfer)

    def park(self, message: Open, conn: int, peer: str, now: float) -> None:
        """Keep an ``Open`` for ``PARK_S``; it replaces one of an older attempt."""
        self._parked[message.transfer] = Parked(message, conn, peer, now + PARK_S)

    def take(self, transfer: bytes) -> Parked | None:
        """The parked ``Open`` of a transfer, which leaves."""
        return self._parked.pop(transfer, None)

    def take_expired(self, now: float) -> list[Parked]:
        """All that waited long enough; they leave."""
        expired = [p for p in self._parked.values() if now >= p.until]
        for parked in expired:
            del self._parked[parked.open.transfer]
        return expired

    def drop_conn(self, conn: int) -> None:
        """Nobody can be answered on this connection any more."""
        self._parked = {t: p for t, p in self._parked.items() if p.conn != conn}

    def next_deadline(self) -> float | None:
        return min((p.until for p in self._parked.values()), default=None)

    def close(self, transfer: bytes, attempt: int) -> None:
        """Remember that this attempt is over."""
        self._closed[transfer] = attempt
        self._closed.move_to_end(transfer)
        if len(self._closed) > MAX_CLOSED:
            self._closed.popitem(last=False)

    def is_closed(self, transfer: bytes, attempt: int) -> bool:
        """True when this attempt or a newer one is over."""
        return self._closed.get(transfer, -1) >= attempt
