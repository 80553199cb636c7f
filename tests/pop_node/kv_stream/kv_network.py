"""The network between a sender and a receiver: it keeps every frame until a test decides about it.

Its codec is a fake: a block is a number of half the piece's length, and what it decodes to is
looked up.
"""

from __future__ import annotations

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import CODEC_PACKED, CODEC_RAW, Data, data_checksum
from tests.pop_node.kv_stream.kv_content import (
    CHUNK,
)
from tests.pop_node.kv_stream.kv_ends import CONN, LINK, Ends
from wire.errors import MeshError, PeerError


class Network(Ends):
    """Frames that leave, arrive, are unpacked, come late or never."""

    def write_one(self) -> bool:
        if not self.to_write:
            return False
        s = self.to_write.pop(0)
        payload = self.export[s.slot]
        assert payload is not None, "a slot was freed before it was written"
        p, codec = s.piece, CODEC_RAW
        if s.dtype is not None and p.layer_lo + p.token_lo // CHUNK != 1:  # that one stays raw
            payload, codec = self.pack(payload), CODEC_PACKED
        checksum = data_checksum(s.transfer, s.attempt, p, codec, payload)
        data = Data(
            s.transfer,
            s.attempt,
            p.group,
            p.component,
            p.layer_lo,
            p.layer_hi,
            p.token_lo,
            p.token_hi,
            codec,
            checksum,
        )
        self.up.append((data, payload))
        self.p(ev.Sending(s.transfer, s.nbytes, len(payload) + 60, codec))
        self.p(ev.Written(s.slot))
        return True

    def pack(self, payload: bytes) -> bytes:
        block = len(self.unpacked).to_bytes(len(payload) // 2, "big")
        self.unpacked[block] = payload
        return block

    def deliver_up(self, at: int = 0) -> bool:
        if not self.up:
            return False
        self.arrive(*self.up.pop(at % len(self.up)), self.link)
        return True

    def deliver_stale(self) -> bool:
        """Something that P had sent over a link that it left reaches D after all."""
        if not self.stale:
            return False
        self.arrive(*self.stale.pop(0))
        return True

    def arrive(self, message, payload: bytes, link: int) -> None:
        number = link if self.version > 1 else 0
        conn = CONN + max(link, 1) - 1
        if not isinstance(message, Data):
            self.d(ev.FrameIn(conn, "p", message, number))
            return
        before = set(self.slots)
        self.d(ev.DataBegins(conn, "p", message, len(payload), number))
        for slot in set(self.slots) - before:
            self.arriving.append((slot, message, payload))
            self.arriving_on[slot] = conn

    def finish_one(self, at: int = 0) -> bool:
        """The rest of a payload arrives."""
        if not self.arriving:
            return False
        slot, data, payload = self.arriving.pop(at % len(self.arriving))
        self.slots[slot] = payload
        checksum = data_checksum(data.transfer, data.attempt, data.piece, data.codec, payload)
        self.d(ev.DataEnded(slot, checksum))
        self.drop_unused(slot)
        return True

    def unpack_one(self, at: int = 0) -> bool:
        """A thread is done with a block. Its slot is nobody else's, whatever happened."""
        if not self.to_unpack:
            return False
        item = self.to_unpack.pop(at % len(self.to_unpack))
        block = self.slots[item.slot]
        assert len(block) == item.nbytes
        found = self.unpacked.get(block, b"")
        self.slots[item.slot] = found
        self.d(ev.Unpacked(item.slot, len(found) == item.kv_bytes))
        self.drop_unused(item.slot)
        return True

    def drop_unused(self, slot: int) -> None:
        """A slot that was neither imported nor is unpacked is free."""
        if slot not in {item.slot for item in [*self.to_unpack, *self.to_import]}:
            self.slots.pop(slot, None)

    def deliver_down(self, at: int = 0) -> bool:
        if not self.down:
            return False
        self.p(ev.FromPeer(LINK, self.down.pop(at % len(self.down))))
        return True

    def break_link(self, *, d_notices: bool = True, is_silent: bool = False) -> None:
        """The connections are gone, with everything on them. A D that does not notice may still
        hear what was on its way. ``is_silent``: nothing was heard for as long as one waits."""
        error = PeerError("gone", code="link_lost")
        self.link_is_up = False
        link, up = self.link, self.up[:]
        self.up.clear()
        self.down.clear()
        for item in self.to_write:
            self.p(ev.Written(item.slot))
        self.to_write.clear()
        if d_notices:
            self.lose(self.conn, error, is_silent=is_silent)
        else:
            self.stale += [(*frame, link) for frame in up]
            self.unnoticed.append(self.conn)
        self.p(ev.LinkDown(LINK, error, is_silent))

    def notice(self) -> None:
        """D learns of the end of links that P left long ago; nothing more comes over them."""
        self.stale.clear()
        for conn in self.unnoticed:
            self.lose(conn, PeerError("gone", code="link_lost"))
        self.unnoticed.clear()

    def lose(self, conn: int, error: MeshError, *, is_silent: bool = False) -> None:
        """D hears that a connection is gone, with the payloads under way on it."""
        for item in [item for item in self.arriving if self.arriving_on[item[0]] == conn]:
            self.arriving.remove(item)
            del self.slots[item[0]]
        self.d(ev.ConnLost(conn, error, is_silent))
