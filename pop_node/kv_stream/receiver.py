"""The decode node's half of every KV transfer: a pure machine for all its transfers.

One transfer: ``Expected`` (our decode leg) and ``Open`` (the prefill node) in either order, then
``Allocated`` -> ``Grant`` -> pieces come in, are checked and imported -> ``Commit`` ->
``Committed`` and ``Done`` once every needed piece is in the engine's blocks. It ends exactly
once, by ``Committed`` or ``Failed``. Slots in use are ``landing``'s. Frames of ended transfers,
older attempts and older links are dropped and counted.

When the connection breaks the transfer is detached: what arrived stays, the peer says ``Open``
again over a new link and hears in the ``Grant`` where to go on. A transfer that was committed in
the meantime is answered with ``Done``.

Who waits for what: the machine itself bounds how long an ``Open`` is parked, the wait for the
``Open`` (the first, or again), the import of a piece, and the pieces that are missing after the
``Commit``. A prefill node that queues or computes is waited for as long as its connection answers
pings (the shell reports ``ConnLost`` when it does not), and never past the request's deadline;
``starvation`` is the exception.
"""

from __future__ import annotations

from collections.abc import Iterable

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.credit import SlotPool
from pop_node.kv_stream.faults import as_text, expired, reported, timed_out
from pop_node.kv_stream.frames import (
    CODEC_RAW,
    Abort,
    Commit,
    Data,
    Done,
    Open,
)
from pop_node.kv_stream.grants import Grants
from pop_node.kv_stream.incoming import Incoming, Landed, ReceiverCounts
from pop_node.kv_stream.landing import Importing, Landing, Receiving
from pop_node.kv_stream.parking import PARK_S, Parked, Parking
from pop_node.kv_stream.starvation import Starvation
from wire.errors import MeshError, PeerError, TransferError, error_from_code


class Receiver:
    """All incoming transfers of one node, and the import slots ``[first, first + count)``."""

    def __init__(self, first_slot: int, slots: int, slot_bytes: int) -> None:
        self.counts = ReceiverCounts()
        self.pool = SlotPool(first_slot, slots)
        self._slot_bytes = slot_bytes
        self._incoming: dict[bytes, Incoming] = {}
        self._parking = Parking(self.counts)
        self._grants = Grants(self.pool, slot_bytes, self._incoming)
        self._landing = Landing(self.pool)
        self._starvation = Starvation()
        self._rtt_s: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._incoming)

    def transfers(self) -> list[bytes]:
        """Ids of the transfers under way."""
        return list(self._incoming)

    def kept_tokens(self, transfer: bytes) -> int:
        """What ``Failed`` would say if the transfer ended now; 0 when it is not under way."""
        incoming = self._incoming.get(transfer)
        return 0 if incoming is None else incoming.kept_tokens

    @property
    def parked(self) -> int:
        """Opens waiting for their decode leg."""
        return len(self._parking)

    def next_deadline(self) -> float | None:
        """When ``Tick`` is due; None when nothing waits."""
        incoming = self._incoming.values()
        others = self._parking.next_deadline(), self._starvation.deadline(incoming)
        waits = [self._deadline(t) for t in incoming]
        return min([*waits, *(at for at in others if at is not None)], default=None)

    def handle(self, event: ev.ReceiverEvent, now: float) -> list[ev.ReceiverEffect]:
        """Advance by one event.

        Raises ``ValueError`` for an ``Expected`` that repeats a transfer and attempt under way.
        """
        match event:
            case ev.FrameIn(conn, peer, message, link):
                match message:
                    case Open():
                        return self._opened(Parked(message, conn, peer, link, now + PARK_S), now)
                    case Data():
                        raise ValueError("Data comes as DataBegins and DataEnded")
                    case Commit():
                        return self._commit(peer, message, link, now)
                    case Abort():
                        return self._abort(peer, message, now)
            case ev.DataBegins():
                return self._data_begins(event, now)
            case ev.DataMoved(slot, nbytes):
                return self._data_moved(slot, nbytes, now)
            case ev.DataEnded(slot, checksum):
                return self._data_ended(slot, checksum, now)
            case ev.Unpacked(slot, is_sound):
                return self._piece_in(slot, self._landing.unpacking(slot), is_sound, now)
            case ev.Imported(slot):
                return self._imported(slot, now)
            case ev.Expected():
                return self._expect(event, now)
            case ev.Allocated(transfer, have_tokens):
                return self._allocated(transfer, have_tokens, now)
            case ev.Cancelled(transfer, code, text):
                incoming = self._incoming.get(transfer)
                if incoming is None:
                    return []
                return self._end_all([(incoming, error_from_code(code, text))], now)
            case ev.ConnRtt(conn, rtt_s):
                self._rtt_s[conn] = rtt_s
                return []
            case ev.ConnLost():
                return self._conn_lost(event, now)
            case ev.EngineLost(model):
                return self._engine_lost(model, now)
            case ev.Starving(is_starving):
                self._starvation.told(is_starving, now)
                return []
            case ev.Tick():
                return self._tick(now)

    # ---- meeting -------------------------------------------------------------------------------

    def _expect(self, event: ev.Expected, now: float) -> list[ev.ReceiverEffect]:
        effects: list[ev.ReceiverEffect] = []
        older = self._incoming.get(event.transfer)
        if older is not None:
            if older.expected.attempt >= event.attempt:
                raise ValueError("transfer id and attempt in use")
            effects += self._end(older, TransferError("a newer attempt took over"))
        incoming = Incoming(event, last_progress=now)
        self._incoming[event.transfer] = incoming
        self.counts.expected += 1
        parked = self._parking.take(event.transfer)
        if parked is not None:
            effects += self._match(incoming, parked, now)
        return effects

    def _opened(self, caller: Parked, now: float) -> list[ev.ReceiverEffect]:
        transfer, attempt = caller.open.transfer, caller.open.attempt
        incoming = self._incoming.get(transfer)
        if incoming is not None and attempt <= incoming.expected.attempt:
            if attempt < incoming.expected.attempt or incoming.had_link(caller.link):
                self.counts.late_frames += 1
                return []
            return self._match(incoming, caller, now)
        return [*self._parking.receive(caller)]

    def _match(self, incoming: Incoming, caller: Parked, now: float) -> list[ev.ReceiverEffect]:
        if caller.open.attempt < incoming.expected.attempt:
            self.counts.late_frames += 1
            return []
        error = incoming.refuse_open(caller.peer, caller.open)
        if error is not None:
            denial = self._parking.deny(caller, error)
            # A stranger who knows the id must not be able to end the transfer of its owner.
            if caller.peer != incoming.expected.peer:
                return [denial]
            return [denial, *self._end_all([(incoming, error)], now)]
        if incoming.conn is not None:  # we have not noticed yet that the older link is gone
            self._detach(incoming, now)
        self.counts.resumed += incoming.grants > 0
        incoming.attach(caller.conn, caller.link, caller.open.codecs, now)
        return self._ready(incoming, now)

    def _allocated(self, transfer: bytes, have_tokens: int, now: float) -> list[ev.ReceiverEffect]:
        incoming = self._incoming.get(transfer)
        if incoming is None or incoming.have_tokens is not None:
            return []
        incoming.have_tokens, incoming.last_progress = have_tokens, now
        return self._ready(incoming, now)

    def _ready(self, incoming: Incoming, now: float) -> list[ev.ReceiverEffect]:
        """Wait for slots once both the peer and our blocks are there."""
        if incoming.conn is None or incoming.have_tokens is None:
            return []
        self._grants.queue(incoming.expected.transfer)
        return [*self._grants.share(now)]

    # ---- pieces --------------------------------------------------------------------------------

    def _data_begins(self, event: ev.DataBegins, now: float) -> list[ev.ReceiverEffect]:
        data = event.data
        incoming = self._live(event.peer, data.transfer, data.attempt, event.link)
        if incoming is None:
            return []
        error = incoming.refuse_data(data, event.nbytes, self._slot_bytes)
        slot = None
        if error is None:
            receiving = Receiving(data, event.nbytes, event.conn, event.link)
            slot = self._landing.begin(receiving)
        if slot is None:
            error = error or PeerError("Data beyond the credit", code="protocol_error")
            return self._end_all([(incoming, error)], now)
        incoming.landing[slot] = Landed(data.piece)
        return [ev.ReceiveInto(slot)]

    def _data_moved(self, slot: int, nbytes: int, now: float) -> list[ev.ReceiverEffect]:
        held = self._landing.coming_into(slot)
        incoming = self._receiver_of(held)
        if incoming is None or incoming.conn is None:
            return []
        kv_bytes = held.data.piece.nbytes(incoming.expected.spec)
        incoming.landing[slot].nbytes = nbytes * kv_bytes // held.nbytes
        incoming.last_progress = now
        return [self._grants.give(incoming, 0, now)]

    def _data_ended(self, slot: int, checksum: bytes, now: float) -> list[ev.ReceiverEffect]:
        held = self._landing.coming_into(slot)
        incoming, is_sound = self._receiver_of(held), checksum == held.data.checksum
        if incoming is not None and is_sound and held.data.codec != CODEC_RAW:
            self._landing.unpack(slot)
            kv_bytes = held.data.piece.nbytes(incoming.expected.spec)
            return [ev.Unpack(slot, held.nbytes, kv_bytes)]
        return self._piece_in(slot, held, is_sound, now)

    def _piece_in(
        self, slot: int, held: Receiving, is_sound: bool, now: float
    ) -> list[ev.ReceiverEffect]:
        """A piece lies in its slot as the engine wants it, or is damaged."""
        incoming = self._receiver_of(held)
        if incoming is None:
            self.counts.late_frames += 1
            self._landing.end(slot, None)
            return [*self._grants.share(now)]
        del incoming.landing[slot]
        if not is_sound:
            self.counts.bad_checksums += 1
            self._landing.end(slot, None)
            error = TransferError("a KV piece arrived damaged", code="checksum_mismatch")
            return self._end_all([(incoming, error)], now)
        e = incoming.expected
        self._landing.end(slot, Importing(e.transfer, e.attempt, e.model))
        incoming.coverage.add(held.data.piece)
        incoming.importing += 1
        kv_bytes = held.data.piece.nbytes(e.spec)
        incoming.received_bytes += kv_bytes
        incoming.last_progress = now
        self.counts.received_bytes += kv_bytes
        self.counts.received_wire_bytes += held.nbytes
        self.counts.unpacked_pieces += held.data.codec != CODEC_RAW
        effects: list[ev.ReceiverEffect] = [ev.Import(e.transfer, slot, held.data.piece)]
        if incoming.conn is not None:  # else it came over the stripe that was left
            effects.append(self._grants.give(incoming, 0, now))
        return effects

    def _imported(self, slot: int, now: float) -> list[ev.ReceiverEffect]:
        held = self._landing.imported(slot)
        if held is None:
            return []
        effects: list[ev.ReceiverEffect] = []
        incoming = self._incoming.get(held.transfer)
        if incoming is not None and incoming.expected.attempt == held.attempt:
            incoming.importing -= 1
            incoming.last_progress = now
            effects += self._try_commit(incoming)
        return [*effects, *self._grants.share(now)]

    # ---- ending --------------------------------------------------------------------------------

    def _commit(self, peer: str, message: Commit, link: int, now: float) -> list[ev.ReceiverEffect]:
        incoming = self._live(peer, message.transfer, message.attempt, link)
        if incoming is None:
            return []
        refusal = incoming.refuse_commit(message)
        if refusal is not None:
            return self._end_all([(incoming, refusal)], now)
        incoming.ids = tuple(message.ids)
        incoming.last_progress = now
        return [*self._try_commit(incoming), *self._grants.share(now)]

    def _abort(self, peer: str, message: Abort, now: float) -> list[ev.ReceiverEffect]:
        """The peer gave up, over whichever link it says so."""
        if self._parking.withdrawn(peer, message.transfer, message.attempt):
            return []
        incoming = self._live(peer, message.transfer, message.attempt)
        if incoming is None:
            return []
        error = reported(message.code, message.message)
        return self._end_all([(incoming, error)], now, tell_peer=False)

    def _try_commit(self, incoming: Incoming) -> list[ev.ReceiverEffect]:
        if not incoming.is_whole:
            return []
        e, ids, conn = incoming.expected, incoming.ids, incoming.conn
        assert ids is not None
        self._remove(incoming, committed=True)
        self.counts.committed += 1
        committed = ev.Committed(e.transfer, ids)
        if conn is None:  # the peer hears it when it opens the transfer again
            return [committed]
        return [committed, ev.Reply(conn, Done(e.transfer, e.attempt))]

    def _conn_lost(self, lost: ev.ConnLost, now: float) -> list[ev.ReceiverEffect]:
        conn, error = lost.conn, lost.error
        rtt_s = self._rtt_s.pop(conn, 0.0)
        self._parking.drop_conn(conn)
        hit = {t for t, incoming in self._incoming.items() if incoming.conn == conn}
        for slot, held in self._landing.conn_lost(conn):
            incoming = self._receiver_of(held)
            if incoming is not None:
                del incoming.landing[slot]
                hit.add(held.data.transfer)
        ends: list[tuple[Incoming, MeshError]] = []
        for transfer in sorted(hit):
            incoming = self._incoming[transfer]
            if not incoming.may_resume(error):
                ends.append((incoming, error))
            elif incoming.conn is not None:
                incoming.rtt_s = rtt_s
                self._detach(incoming, now, is_silent=lost.is_silent)
        return self._end_all(ends, now)

    def _detach(self, incoming: Incoming, now: float, *, is_silent: bool = False) -> None:
        """Wait for the peer to come again; its credit is void."""
        incoming.detach(now, is_silent=is_silent)
        self._grants.withdraw(incoming.expected.transfer)

    def _engine_lost(self, model: str, now: float) -> list[ev.ReceiverEffect]:
        self._landing.engine_lost(model)
        error = PeerError(f"the engine of {model} died", code="engine_died")
        hit = [t for t in self._incoming.values() if t.expected.model == model]
        return self._end_all([(incoming, error) for incoming in hit], now)

    def _deadline(self, incoming: Incoming) -> float:
        conn = incoming.conn
        return incoming.deadline(incoming.rtt_s if conn is None else self._rtt_s.get(conn, 0.0))

    def _tick(self, now: float) -> list[ev.ReceiverEffect]:
        effects: list[ev.ReceiverEffect] = [
            self._parking.deny(parked, timed_out("no decode leg came here"))
            for parked in self._parking.take_expired(now)
        ]
        ends: list[tuple[Incoming, MeshError]] = []
        for incoming in self._incoming.values():
            if now >= incoming.expected.deadline:
                ends.append((incoming, expired()))
            elif now >= self._deadline(incoming):
                ends.append((incoming, incoming.standstill()))
        if not ends and (victim := self._starvation.take_victim(self._incoming.values(), now)):
            text = f"others wait for its blocks, and {victim.expected.peer} has sent nothing"
            ends.append((victim, timed_out(text)))
        return effects + self._end_all(ends, now)

    def _end_all(
        self, ends: Iterable[tuple[Incoming, MeshError]], now: float, *, tell_peer: bool = True
    ) -> list[ev.ReceiverEffect]:
        """Fail these transfers, then let others have what they held."""
        effects = [e for incoming, error in ends for e in self._end(incoming, error, tell_peer)]
        return [*effects, *self._grants.share(now)]

    def _end(
        self, incoming: Incoming, error: MeshError, tell_peer: bool = True
    ) -> list[ev.ReceiverEffect]:
        e = incoming.expected
        self._remove(incoming)
        self.counts.failed += 1
        effects: list[ev.ReceiverEffect] = [ev.Failed(e.transfer, error, incoming.kept_tokens)]
        if tell_peer and incoming.conn is not None:
            abort = Abort(e.transfer, e.attempt, *as_text(error))
            effects.insert(0, ev.Reply(incoming.conn, abort))
        return effects

    def _remove(self, incoming: Incoming, *, committed: bool = False) -> None:
        transfer = incoming.expected.transfer
        del self._incoming[transfer]
        self._grants.withdraw(transfer)
        self._parking.close(transfer, incoming.expected.attempt, committed=committed)

    def _live(
        self, peer: str, transfer: bytes, attempt: int, link: int | None = None
    ) -> Incoming | None:
        """The transfer that a frame is for; None (counted) when it is late or a stranger's, or came
        over another link than the one that the transfer is attached to."""
        incoming = self._incoming.get(transfer)
        if incoming and (incoming.expected.peer, incoming.expected.attempt) == (peer, attempt):
            attached = incoming.conn is not None and incoming.link == link
            if link is None or attached:
                return incoming
        self.counts.late_frames += 1
        return None

    def _receiver_of(self, held: Receiving) -> Incoming | None:
        """The transfer that still wants this payload."""
        incoming = self._incoming.get(held.data.transfer)
        if incoming is None:
            return None
        current = incoming.expected.attempt, incoming.link
        return incoming if current == (held.data.attempt, held.link) else None
