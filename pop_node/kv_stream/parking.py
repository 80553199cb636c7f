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
    """An ``Open``, where it came from, and until when it may wait for its decode leg."""

    open: Open
    conn: int
    peer: str
    link: int
    until: float


class Parking:
    """Opens that wait for their decode leg, and the ends of transfers past."""

    def __init__(self) -> None:
        self._parked: dict[bytes, Parked] = {}
        self._closed: OrderedDict[bytes, tuple[int, bool]] = OrderedDict()  # attempt, committed

    def __len__(self) -> int:
        return len(self._parked)

    @property
    def is_full(self) -> bool:
        return len(self._parked) >= MAX_PARKED

    def get(self, transfer: bytes) -> Parked | None:
        return self._parked.get(transfer)

    def park(self, caller: Parked) -> None:
        """Keep an ``Open``; it replaces one of an older attempt or link."""
        self._parked[caller.open.transfer] = caller

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

    def close(self, transfer: bytes, attempt: int, *, committed: bool = False) -> None:
        """Remember that this attempt is over, and whether it ended well."""
        self._closed[transfer] = attempt, committed
        self._closed.move_to_end(transfer)
        if len(self._closed) > MAX_CLOSED:
            self._closed.popitem(last=False)

    def is_closed(self, transfer: bytes, attempt: int) -> bool:
        """True when this attempt or a newer one is over."""
        return self._closed.get(transfer, (-1, False))[0] >= attempt

    def is_committed(self, transfer: bytes, attempt: int) -> bool:
        """True when this attempt ended well."""
        return self._closed.get(transfer) == (attempt, True)
