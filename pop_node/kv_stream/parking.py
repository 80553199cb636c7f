"""Transfers that the decode node does not know: those that come early, those that are over."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from pop_node.kv_stream.events import Reply
from pop_node.kv_stream.faults import as_text, reported
from pop_node.kv_stream.frames import Deny, Done, Open
from pop_node.kv_stream.incoming import ReceiverCounts
from wire.errors import MeshError, TransferError

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

    def __init__(self, counts: ReceiverCounts) -> None:
        self._counts = counts
        self._parked: dict[bytes, Parked] = {}
        self._closed: OrderedDict[bytes, tuple[int, bool]] = OrderedDict()  # attempt, committed

    def __len__(self) -> int:
        return len(self._parked)

    def receive(self, caller: Parked) -> list[Reply]:
        """Park an ``Open`` whose transfer is not under way, in place of one of an older attempt or
        link; or answer it, if its transfer is over or there is no room."""
        transfer, attempt = caller.open.transfer, caller.open.attempt
        if caller.open.resumed and self._closed.get(transfer) == (attempt, True):
            return [Reply(caller.conn, Done(transfer, attempt))]
        if self._closed.get(transfer, (-1, False))[0] >= attempt:
            self._counts.late_frames += 1
            return [self.deny(caller, TransferError("the transfer is over here"))]
        if caller.open.resumed:  # it was granted by somebody who is gone
            return [self.deny(caller, TransferError("the transfer is not known here"))]
        other = self._parked.get(transfer)
        if other is not None and (
            other.peer != caller.peer or (other.open.attempt, other.link) >= (attempt, caller.link)
        ):
            self._counts.late_frames += 1
            return []
        if other is None and len(self._parked) >= MAX_PARKED:
            full = reported("overloaded", "too many transfers wait for their decode leg")
            return [self.deny(caller, full)]
        self._parked[transfer] = caller
        return []

    def deny(self, caller: Parked, error: MeshError) -> Reply:
        """The answer to an ``Open`` that leads to no transfer."""
        self._counts.denied += 1
        code, text = as_text(error)
        o = caller.open
        return Reply(caller.conn, Deny(o.transfer, o.attempt, code, text, error.retryable))

    def take(self, transfer: bytes) -> Parked | None:
        """The parked ``Open`` of a transfer, which leaves."""
        return self._parked.pop(transfer, None)

    def withdrawn(self, peer: str, transfer: bytes, attempt: int) -> bool:
        """``peer`` gives up: its parked ``Open`` leaves and is over. False when there is none."""
        parked = self._parked.get(transfer)
        if parked is None or (parked.peer, parked.open.attempt) != (peer, attempt):
            return False
        del self._parked[transfer]
        self.close(transfer, attempt)
        return True

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
