"""Blocks that wait for KV while nothing else can run: who gives theirs back, and when.

A decode leg holds blocks from its start, its prefill leg may queue for a long time, and that queue
may be behind a decode leg whose prefill leg queues here: with full caches two nodes can wait for
each other. An engine that computes nothing although sequences wait for blocks looks like this from
inside, whatever the circle outside. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pop_node.kv_stream.incoming import Incoming
from pop_node.kv_stream.liveness import MIN_WAIT_S


class Starvation:
    """Since when the engine has stood still for want of blocks."""

    def __init__(self) -> None:
        self._since: float | None = None

    def told(self, is_starving: bool, now: float) -> None:
        """The engine's last word: it computes nothing and sequences wait, or not."""
        if not is_starving:
            self._since = None
        elif self._since is None:
            self._since = now

    def deadline(self, transfers: Collection[Incoming]) -> float | None:
        """When the next transfer must give way; None while there is no need."""
        due = [at for at, _ in self._waits(transfers)]
        return min(due, default=None)

    def take_victim(self, transfers: Collection[Incoming], now: float) -> Incoming | None:
        """The transfer that fails now, the youngest of those that have brought nothing for as long
        as one waits for progress. One at a time: the others get that long again, in which the
        blocks may do."""
        due = [transfer for at, transfer in self._waits(transfers) if now >= at]
        if not due:
            return None
        self._since = now
        return due[-1]

    def _waits(self, transfers: Iterable[Incoming]) -> list[tuple[float, Incoming]]:
        """Transfers that hold blocks for nothing yet, as they came, and until when they may."""
        since = self._since
        if since is None:
            return []
        return [
            (max(since, transfer.last_progress) + MIN_WAIT_S, transfer)
            for transfer in transfers
            if transfer.is_idle
        ]
