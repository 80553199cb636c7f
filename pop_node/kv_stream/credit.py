"""Import slots of a decode node, and how transfers share them.

Pure. A slot is in one of three states: free, promised (credit that a sender may use at any
moment) or used (being received or imported). ``free + promised + used`` is constant, and only
free slots are ever promised, so a ``Data`` frame within its credit always finds a slot.

Sharing is the dynamic threshold of packet switches: a transfer may hold up to ``SHARE`` times what
is free. One transfer gets SHARE/(1 + SHARE) of the slots, n of them SHARE/(1 + n SHARE) each, and a
part is always left for the next one: a sender that still computes cannot keep others out.
Source: A. Choudhury and E. Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet
Switches", IEEE/ACM Transactions on Networking 6(2), 1998.
"""

from __future__ import annotations

from collections.abc import Collection

SHARE = 2
"""The first transfer holds two thirds: 21 of 32 MiB, which is 1 Gbit/s at 178 ms."""

MIN_GRANT_SLOTS = 2
"""Least credit of a grant: one slot fills while the other is imported."""


class SlotPool:
    """Slots ``[first, first + count)`` and who holds how many."""

    def __init__(self, first: int, count: int) -> None:
        if count < 1:
            raise ValueError("a decode node needs at least one import slot")
        self.count = count
        self._min_grant = min(MIN_GRANT_SLOTS, count)
        self._unused = list(range(first + count - 1, first - 1, -1))
        self._owner: dict[int, bytes] = {}
        self._promised: dict[bytes, int] = {}
        self._used: dict[bytes, int] = {}
        self._promised_total = 0

    @property
    def free(self) -> int:
        """Slots neither used nor promised."""
        return len(self._unused) - self._promised_total

    @property
    def promised(self) -> int:
        return self._promised_total

    @property
    def used(self) -> int:
        return len(self._owner)

    def admit(self, transfer: bytes) -> int:
        """Promise a first grant; the number of slots, 0 when too few are free."""
        if self.free < self._min_grant:
            return 0
        self._promised[transfer] = self._min_grant
        self._promised_total += self._min_grant
        return self._min_grant

    def top_up(self, transfers: Collection[bytes]) -> dict[bytes, int]:
        """Promise free slots to admitted transfers, those that hold least first."""
        given: dict[bytes, int] = {}
        while self.free and transfers:
            poorest = min(transfers, key=self._held)
            # A transfer that holds nothing could not go on at all: it may have the last slot.
            if 0 < self._held(poorest) >= SHARE * self.free:
                break
            self._promised[poorest] = self._promised.get(poorest, 0) + 1
            self._promised_total += 1
            given[poorest] = given.get(poorest, 0) + 1
        return given

    def use(self, transfer: bytes) -> int | None:
        """Turn one promised slot into a used one: its number, None when nothing was promised."""
        if not self._promised.get(transfer):
            return None
        self._promised[transfer] -= 1
        self._promised_total -= 1
        slot = self._unused.pop()
        self._owner[slot] = transfer
        self._used[transfer] = self._used.get(transfer, 0) + 1
        return slot

    def release(self, slot: int) -> None:
        """A used slot is free again; raises ``KeyError`` when it was not used."""
        transfer = self._owner.pop(slot)
        self._used[transfer] -= 1
        if not self._used[transfer]:
            del self._used[transfer]
        self._unused.append(slot)

    def forget(self, transfer: bytes) -> None:
        """Take back what is promised; used slots stay used until they are released."""
        self._promised_total -= self._promised.pop(transfer, 0)

    def _held(self, transfer: bytes) -> int:
        return self._promised.get(transfer, 0) + self._used.get(transfer, 0)
