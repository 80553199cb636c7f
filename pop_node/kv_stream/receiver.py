"""The decode node's half of every KV transfer: a pure machine for all its transfers.

One transfer: ``Expected`` (our decode leg) and ``Open`` (the prefill node) in either order, then
``Allocated`` -> ``Grant`` -> pieces come in, are checked and imported -> ``Commit`` ->
``Committed`` and ``Done`` once every needed piece is in the engine's blocks. It ends exactly
once, by ``Committed`` or ``Failed``. An import slot that is being received or imported stays
taken when its transfer ends, until its bytes are in or its connection is gone, and the engine let
go of it: late bytes can never land in a slot that has a new owner. Frames of ended transfers and
older attempts are dropped and counted.

Who waits for what: the machine itself bounds how long an ``Open`` is parked, the wait for the
``Open``, the import of a piece, and the pieces that are missing after the ``Commit``. A prefill
node that queues or computes is waited for as long as its connection answers pings (the shell
reports ``ConnLost`` when it does not), and never past the request's deadline.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.credit import SlotPool
from pop_node.kv_stream.faults import as_text, expired, reported, timed_out
from pop_node.kv_stream.frames import (
    CODEC_RAW,
    Abort,
    Ack,
    Commit,
    Data,
    Deny,
    Done,
    Grant,
    Open,
)
from pop_node.kv_stream.incoming import Importing, Incoming, ReceiverCounts, Receiving
from pop_node.kv_stream.liveness import wait_limit_s
from pop_node.kv_stream.parking import Parking
from wire.errors import MeshError, PeerError, TransferError, error_from_code

IMPORT_WAIT_S = 30.0
"""Longest import of a piece. Guess: several of the longest engine steps of a slow CPU."""


class Receiver:
    """All incoming transfers of one node, and the import slots ``[first, first + count)``."""

    def __init__(self, first_slot: int, slots: int, slot_bytes: int) -> None:
        self.counts = ReceiverCounts()
        self.pool = SlotPool(first_slot, slots)
        self._slot_bytes = slot_bytes
        self._incoming: dict[bytes, Incoming] = {}
        self._parking = Parking()
        self._ungranted: OrderedDict[bytes, None] = OrderedDict()  # waiting for slots, oldest first
        self._receiving: dict[int, Receiving] = {}
        self._importing: dict[int, Importing] = {}
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
        waits = [self._deadline(t) for t in self._incoming.values()]
        parked_until = self._parking.next_deadline()
        return min(waits if parked_until is None else [*waits, parked_until], default=None)

    def handle(self, event: ev.ReceiverEvent, now: float) -> list[ev.ReceiverEffect]:
        """Advance by one event.

        Raises ``ValueError`` for an ``Expected`` that repeats a transfer and attempt under way.
        """
        match event:
            case ev.FrameIn(conn, peer, message):
                match message:
                    case Open():
                        return self._opened(conn, peer, message, now)
                    case Data():
                        raise ValueError("Data comes as DataBegins and DataEnded")
                    case Commit() | Abort():
                        return self._from_sender(peer, message, now)
            case ev.DataBegins(conn, peer, data, nbytes):
                return self._data_begins(conn, peer, data, nbytes, now)
            case ev.DataEnded(slot, checksum):
                return self._data_ended(slot, checksum, now)
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
            case ev.ConnLost(conn, error):
                return self._conn_lost(conn, error, now)
            case ev.EngineLost(model):
                return self._engine_lost(model, now)
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
            effects += self._match(incoming, parked.conn, parked.peer, parked.open, now)
        return effects

    def _opened(self, conn: int, peer: str, message: Open, now: float) -> list[ev.ReceiverEffect]:
        incoming = self._incoming.get(message.transfer)
        if incoming is not None and message.attempt <= incoming.expected.attempt:
            if message.attempt < incoming.expected.attempt or incoming.conn is not None:
                self.counts.late_frames += 1
                return []
            return self._match(incoming, conn, peer, message, now)
        if self._parking.is_closed(message.transfer, message.attempt):
            self.counts.late_frames += 1
            return [self._deny(conn, message, TransferError("the transfer is over here"))]
        other = self._parking.get(message.transfer)
        if other is not None and (other.peer != peer or other.open.attempt >= message.attempt):
            self.counts.late_frames += 1
            return []
        if other is None and self._parking.is_full:
            full = reported("overloaded", "too many transfers wait for their decode leg")
            return [self._deny(conn, message, full)]
        self._parking.park(message, conn, peer, now)
        return []

    def _match(
        self, incoming: Incoming, conn: int, peer: str, message: Open, now: float
    ) -> list[ev.ReceiverEffect]:
        if message.attempt < incoming.expected.attempt:
            self.counts.late_frames += 1
            return []
        error = incoming.refuse_open(peer, message)
        if error is not None:
            denial = self._deny(conn, message, error)
            # A stranger who knows the id must not be able to end the transfer of its owner.
            if peer != incoming.expected.peer:
                return [denial]
            return [denial, *self._end_all([(incoming, error)], now)]
        incoming.conn = conn
        incoming.last_progress = now
        return self._ready(incoming, now)

    def _allocated(self, transfer: bytes, have_tokens: int, now: float) -> list[ev.ReceiverEffect]:
        incoming = self._incoming.get(transfer)
        if incoming is None or incoming.have_tokens is not None:
            return []
        incoming.have_tokens = have_tokens
        incoming.last_progress = now
        return self._ready(incoming, now)

    def _ready(self, incoming: Incoming, now: float) -> list[ev.ReceiverEffect]:
        """Queue for slots once both the peer and our blocks are there."""
        if incoming.conn is None or incoming.have_tokens is None:
            return []
        self._ungranted[incoming.expected.transfer] = None
        return self._share(now)

    def _share(self, now: float) -> list[ev.ReceiverEffect]:
        """Hand free slots out: first to those without a ``Grant``, then to those who hold least."""
        credits: dict[bytes, int] = {}
        for transfer in list(self._ungranted):
            incoming = self._incoming[transfer]
            have = incoming.have_tokens
            assert have is not None
            if have < incoming.most_tokens:
                credit = self.pool.admit(transfer)
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
        for transfer, credit in self.pool.top_up(needy).items():
            credits[transfer] = credits.get(transfer, 0) + credit
        return [self._give(self._incoming[t], credit, now) for t, credit in credits.items()]

    def _give(self, incoming: Incoming, slots: int, now: float) -> ev.Reply:
        e, credit_bytes = incoming.expected, slots * self._slot_bytes
        assert incoming.conn is not None
        assert incoming.have_tokens is not None
        if incoming.granted:
            ack = Ack(e.transfer, e.attempt, credit_bytes, incoming.received_bytes)
            return ev.Reply(incoming.conn, ack)
        incoming.granted = True
        incoming.last_progress = now
        del self._ungranted[e.transfer]
        grant = Grant(e.transfer, e.attempt, credit_bytes, incoming.have_tokens, CODEC_RAW)
        return ev.Reply(incoming.conn, grant)

    # ---- pieces --------------------------------------------------------------------------------

    def _data_begins(
        self, conn: int, peer: str, data: Data, nbytes: int, now: float
    ) -> list[ev.ReceiverEffect]:
        incoming = self._live(peer, data.transfer, data.attempt)
        if incoming is None:
            return []
        error = incoming.refuse_data(data, nbytes, self._slot_bytes)
        slot = self.pool.use(data.transfer) if error is None else None
        if slot is None:
            error = error or PeerError("Data beyond the credit", code="protocol_error")
            return self._end_all([(incoming, error)], now)
        incoming.coverage.add(data.piece)
        incoming.receiving += 1
        self._receiving[slot] = Receiving(data, nbytes, conn)
        return [ev.ReceiveInto(slot)]

    def _data_ended(self, slot: int, checksum: bytes, now: float) -> list[ev.ReceiverEffect]:
        held = self._receiving.pop(slot)
        data = held.data
        incoming = self._incoming.get(data.transfer)
        if incoming is None or incoming.expected.attempt != data.attempt:
            self.counts.late_frames += 1
            self.pool.release(slot)
            return self._share(now)
        incoming.receiving -= 1
        if checksum != data.checksum:
            self.counts.bad_checksums += 1
            self.pool.release(slot)
            error = TransferError("a KV piece arrived damaged", code="checksum_mismatch")
            return self._end_all([(incoming, error)], now)
        e = incoming.expected
        incoming.arrived.add(data.piece)
        incoming.importing += 1
        incoming.received_bytes += held.nbytes
        incoming.last_progress = now
        self.counts.received_bytes += held.nbytes
        self._importing[slot] = Importing(e.transfer, e.attempt, e.model)
        return [ev.Import(e.transfer, slot, data.piece), self._give(incoming, 0, now)]

    def _imported(self, slot: int, now: float) -> list[ev.ReceiverEffect]:
        held = self._importing.pop(slot, None)
        if held is None:  # the engine died meanwhile and its slots were taken back
            return []
        self.pool.release(slot)
        effects: list[ev.ReceiverEffect] = []
        incoming = self._incoming.get(held.transfer)
        if incoming is not None and incoming.expected.attempt == held.attempt:
            incoming.importing -= 1
            incoming.last_progress = now
            effects += self._try_commit(incoming)
        return effects + self._share(now)

    # ---- ending --------------------------------------------------------------------------------

    def _from_sender(
        self, peer: str, message: Commit | Abort, now: float
    ) -> list[ev.ReceiverEffect]:
        parked = self._parking.get(message.transfer)
        if parked and (parked.peer, parked.open.attempt) == (peer, message.attempt):
            self._parking.take(message.transfer)
            self._parking.close(message.transfer, message.attempt)
            return []
        incoming = self._live(peer, message.transfer, message.attempt)
        if incoming is None:
            return []
        if isinstance(message, Abort):
            error = reported(message.code, message.message)
            return self._end_all([(incoming, error)], now, tell_peer=False)
        refusal = incoming.refuse_commit(message)
        if refusal is not None:
            return self._end_all([(incoming, refusal)], now)
        incoming.ids = tuple(message.ids)
        incoming.last_progress = now
        return [*self._try_commit(incoming), *self._share(now)]

    def _try_commit(self, incoming: Incoming) -> list[ev.ReceiverEffect]:
        if not incoming.is_whole:
            return []
        e, ids, conn = incoming.expected, incoming.ids, incoming.conn
        assert ids is not None
        assert conn is not None
        self._remove(incoming)
        self.counts.committed += 1
        return [ev.Committed(e.transfer, ids), ev.Reply(conn, Done(e.transfer, e.attempt))]

    def _conn_lost(self, conn: int, error: MeshError, now: float) -> list[ev.ReceiverEffect]:
        self._rtt_s.pop(conn, None)
        self._parking.drop_conn(conn)
        hit = {t for t, incoming in self._incoming.items() if incoming.conn == conn}
        for slot, held in list(self._receiving.items()):
            if held.conn == conn:  # half a payload: its transfer cannot become whole
                del self._receiving[slot]
                self.pool.release(slot)
                if self._live_attempt(held.data):
                    hit.add(held.data.transfer)
        return self._end_all([(self._incoming[t], error) for t in sorted(hit)], now)

    def _engine_lost(self, model: str, now: float) -> list[ev.ReceiverEffect]:
        for slot, held in list(self._importing.items()):
            if held.model == model:
                del self._importing[slot]
                self.pool.release(slot)
        error = PeerError(f"the engine of {model} died", code="engine_died")
        hit = [t for t in self._incoming.values() if t.expected.model == model]
        return self._end_all([(incoming, error) for incoming in hit], now)

    def _deadline(self, incoming: Incoming) -> float:
        """The earlier of the request's deadline and the end of the wait for progress."""
        limit = wait_limit_s(self._rtt_s.get(-1 if incoming.conn is None else incoming.conn, 0.0))
        deadline, progress = incoming.expected.deadline, incoming.last_progress
        if incoming.importing:
            return min(deadline, progress + IMPORT_WAIT_S)
        if incoming.conn is None or incoming.ids is not None:
            return min(deadline, progress + limit)
        return deadline

    def _tick(self, now: float) -> list[ev.ReceiverEffect]:
        effects: list[ev.ReceiverEffect] = [
            self._deny(parked.conn, parked.open, timed_out("no decode leg came here"))
            for parked in self._parking.take_expired(now)
        ]
        ends: list[tuple[Incoming, MeshError]] = []
        for incoming in self._incoming.values():
            if now >= incoming.expected.deadline:
                ends.append((incoming, expired()))
            elif now >= self._deadline(incoming):
                what = "no Open came" if incoming.conn is None else "the KV transfer stands still"
                ends.append((incoming, timed_out(f"{what} ({incoming.expected.peer})")))
        return effects + self._end_all(ends, now)

    def _end_all(
        self, ends: Iterable[tuple[Incoming, MeshError]], now: float, *, tell_peer: bool = True
    ) -> list[ev.ReceiverEffect]:
        """Fail these transfers, then let others have what they held."""
        effects = [e for incoming, error in ends for e in self._end(incoming, error, tell_peer)]
        return effects + self._share(now)

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

    def _remove(self, incoming: Incoming) -> None:
        transfer = incoming.expected.transfer
        del self._incoming[transfer]
        self._ungranted.pop(transfer, None)
        self.pool.forget(transfer)
        self._parking.close(transfer, incoming.expected.attempt)

    def _live(self, peer: str, transfer: bytes, attempt: int) -> Incoming | None:
        """The transfer that a frame is for; None (counted) when it is late or a stranger's."""
        incoming = self._incoming.get(transfer)
        if incoming and (incoming.expected.peer, incoming.expected.attempt) == (peer, attempt):
            return incoming
        self.counts.late_frames += 1
        return None

    def _live_attempt(self, data: Data) -> bool:
        incoming = self._incoming.get(data.transfer)
        return incoming is not None and incoming.expected.attempt == data.attempt

    def _deny(self, conn: int, message: Open, error: MeshError) -> ev.Reply:
        self.counts.denied += 1
        code, text = as_text(error)
        return ev.Reply(conn, Deny(message.transfer, message.attempt, code, text, error.retryable))
