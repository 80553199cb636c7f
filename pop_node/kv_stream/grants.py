"""Who gets import slots when: the ``Grant`` of each transfer and the credit of its ``Ack`` frames.

Pure. Works on the receiver's transfers; a transfer queues here from the moment that both the peer
and our blocks are there, until enough slots are free for its ``Grant``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from pop_node.kv_stream.credit import SlotPool
from pop_node.kv_stream.events import Reply
from pop_node.kv_stream.frames import Ack, Grant
from pop_node.kv_stream.incoming import Incoming


class Grants:
    """Shares ``pool`` among ``incoming``, the transfers under way."""

    def __init__(self, pool: SlotPool, slot_bytes: int, incoming: Mapping[bytes, Incoming]) -> None:
        self._pool = pool
        self._slot_bytes = slot_bytes
        self._incoming = incoming
        self._waiting: OrderedDict[bytes, None] = OrderedDict()  # oldest first

    def queue(self, transfer: bytes) -> None:
        """This transfer may be granted from now on."""
        self._waiting[transfer] = None

    def withdraw(self, transfer: bytes) -> None:
        """It is over or detached: what it was promised is free again."""
        self._waiting.pop(transfer, None)
        self._pool.forget(transfer)

    def share(self, now: float) -> list[Reply]:
        """Hand free slots out: first to those without a ``Grant``, then to those who hold least."""
        credits: dict[bytes, int] = {}
        for transfer in list(self._waiting):
            incoming = self._incoming[transfer]
            have = incoming.have_tokens
            assert have is not None
            if have < incoming.most_tokens:
                credit = self._pool.admit(transfer)
                if not credit:
                    break
                credits[transfer] = credit
            else:
                credits[transfer] = 0
        needy = [
            transfer
            for transfer, incoming in self._incoming.items()
            if (incoming.granted or credits.get(transfer)) and incoming.ids is None
        ]
        for transfer, credit in self._pool.top_up(needy).items():
            credits[transfer] = credits.get(transfer, 0) + credit
        return [self.give(self._incoming[t], credit, now) for t, credit in credits.items()]

    def give(self, incoming: Incoming, slots: int, now: float) -> Reply:
        """Tell an attached transfer's peer its credit and what has arrived."""
        e, credit_bytes = incoming.expected, slots * self._slot_bytes
        assert incoming.conn is not None
        assert incoming.have_tokens is not None
        if incoming.granted:
            ack = Ack(e.transfer, e.attempt, credit_bytes, incoming.bytes_seen)
            return Reply(incoming.conn, ack)
        del self._waiting[e.transfer]
        have, arrived = incoming.have_tokens, incoming.arrived()
        incoming.granted = True
        incoming.grants += 1
        incoming.last_progress = now
        grant = Grant(e.transfer, e.attempt, credit_bytes, have, incoming.codec, arrived)
        return Reply(incoming.conn, grant)
