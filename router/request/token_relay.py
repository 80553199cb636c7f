"""Puts the tokens of two legs into one order: every output index once, none skipped.

Pure. The prefill node says [0:h] and the decode node the rest, over different links, so the decode
node's first entries may come early; they wait here, at most ``MAX_WAITING_ENTRIES`` of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from wire.errors import PeerError
from wire.messages import StepEntry

MAX_WAITING_ENTRIES = 512
"""Decode entries that may wait for the prefill node's first token: over 10 s of one stream."""


class TokenRelay:
    """``ids`` are the tokens in order so far; they outlive attempts, waiting entries do not."""

    def __init__(self, relayed: Iterable[int] = ()) -> None:
        """``relayed`` tokens were read by the client before."""
        self.ids: list[int] = list(relayed)
        self._waiting: list[StepEntry] = []  # contiguous
        self._waiting_end = 0

    @property
    def has_gap(self) -> bool:
        """Entries wait for an index that has not come."""
        return bool(self._waiting)

    def add(self, node: str, entry: StepEntry, may_wait: bool) -> list[StepEntry]:
        """Entries that are now in order, ``entry`` included unless it waits.

        Raises ``PeerError`` (``protocol_error``) for an index already relayed, or one ahead of its
        turn when nobody is left who could say the missing ones (``may_wait`` false).
        """
        expected = len(self.ids)
        end = entry.index + len(entry.ids)
        if entry.index > expected:
            if self._waiting and entry.index != self._waiting_end:
                raise _out_of_order(node, entry.index, self._waiting_end)
            self._waiting.append(entry)
            self._waiting_end = end
            if not may_wait or len(self._waiting) > MAX_WAITING_ENTRIES:
                raise self.missing(node)
            return []
        if entry.index < expected:
            raise _out_of_order(node, entry.index, expected)
        # Nothing is taken over before everything is checked: what is in ``ids`` was relayed.
        if self._waiting and end > self._waiting[0].index:
            raise _out_of_order(node, self._waiting[0].index, end)
        self.ids += entry.ids
        if not self._waiting or end < self._waiting[0].index:
            return [entry]
        ready = [entry, *self._waiting]
        for waiting in self._waiting:
            self.ids += waiting.ids
        self._waiting.clear()
        return ready

    def forget_waiting(self) -> None:
        """An attempt is over; what was not relayed will be said again."""
        self._waiting.clear()

    def missing(self, node: str) -> PeerError:
        """The error for a gap that ``node`` leaves behind."""
        return _out_of_order(node, self._waiting[0].index, len(self.ids))


def _out_of_order(node: str, index: int, expected: int) -> PeerError:
    return PeerError(
        f"{node}: token index {index} came where {expected} was expected", code="protocol_error"
    )
