"""Import slots in use: pieces whose bytes come in, are unpacked, or are read by the engine.

Pure. A slot that is taken here stays taken, whatever becomes of its transfer, until its bytes are
in or its connection is gone, its block is unpacked, and the engine let go of it: late bytes never
land in a slot that has a new owner.
"""

from __future__ import annotations

from dataclasses import dataclass

from pop_node.kv_stream.credit import SlotPool
from pop_node.kv_stream.frames import Data


@dataclass(frozen=True, slots=True)
class Receiving:
    """An import slot that bytes come into from connection ``conn`` of link ``link``."""

    data: Data
    nbytes: int
    conn: int
    link: int


@dataclass(frozen=True, slots=True)
class Importing:
    """An import slot that the engine reads."""

    transfer: bytes
    attempt: int
    model: str


class Landing:
    """Who uses which slot of ``pool``."""

    def __init__(self, pool: SlotPool) -> None:
        self.pool = pool
        self._receiving: dict[int, Receiving] = {}
        self._unpacking: dict[int, Receiving] = {}
        self._importing: dict[int, Importing] = {}

    def begin(self, receiving: Receiving) -> int | None:
        """The slot for a payload; None when its transfer has no credit."""
        slot = self.pool.use(receiving.data.transfer)
        if slot is not None:
            self._receiving[slot] = receiving
        return slot

    def coming_into(self, slot: int) -> Receiving:
        """What is being received into a slot."""
        return self._receiving[slot]

    def unpack(self, slot: int) -> None:
        """The bytes are in; a thread unpacks them, whether or not their connection lives on."""
        self._unpacking[slot] = self._receiving.pop(slot)

    def unpacking(self, slot: int) -> Receiving:
        """What is being unpacked in a slot."""
        return self._unpacking[slot]

    def end(self, slot: int, importing: Importing | None) -> None:
        """The piece is there; the engine reads it now, or nobody wants it."""
        del (self._unpacking if slot in self._unpacking else self._receiving)[slot]
        if importing is None:
            self.pool.release(slot)
        else:
            self._importing[slot] = importing

    def imported(self, slot: int) -> Importing | None:
        """The engine lets go of a slot; None when its slots were taken back before."""
        held = self._importing.pop(slot, None)
        if held is not None:
            self.pool.release(slot)
        return held

    def conn_lost(self, conn: int) -> list[tuple[int, Receiving]]:
        """No more bytes come over this connection: the payloads that it cut short."""
        cut = [(slot, held) for slot, held in self._receiving.items() if held.conn == conn]
        for slot, _ in cut:
            del self._receiving[slot]
            self.pool.release(slot)
        return cut

    def engine_lost(self, model: str) -> None:
        """The engine of ``model`` reads nothing any more."""
        for slot, held in list(self._importing.items()):
            if held.model == model:
                del self._importing[slot]
                self.pool.release(slot)
