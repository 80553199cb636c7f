"""The prefill node's half of every KV transfer: a pure machine for all its transfers.

One transfer: ``Opened`` -> link -> ``Open`` sent -> ``Grant`` -> the engine stages from D's
coverage -> pieces are sent in order within the credit -> ``Commit`` once everything needed was
sent and the ids are known -> ``Done``. It ends exactly once, by ``Delivered`` or ``Failed``;
every staged slot comes back exactly once, by ``SlotFree``.

When the link breaks, a transfer that its decode node knows waits for another one: the machine
dials again, says ``Open`` again, and the ``Grant`` says from where on the engine has to stage. A
decode node that was restarted, or does not know the transfer, ends it at once. A transfer that is
new fails with the first dial that began for it, not with one that others had begun before.

Who waits for what: the machine itself bounds the wait for a link and for acknowledgements of bytes
that were sent, and, once a prompt is computed, for room at the decode node: the blocks that the
transfer keeps here may be what the decode node's own waits depend on. While it is computed, a
decode node is waited for as long as its connection answers pings (the shell reports ``LinkDown``
when it does not), and never past the request's deadline.
"""

from __future__ import annotations

from pop_node.kv_stream.events import (
    Cancelled,
    CommitReady,
    ComputeEnded,
    ComputeStarted,
    Connect,
    Delivered,
    EngineLost,
    Failed,
    FromPeer,
    LinkDown,
    LinkRtt,
    LinkUp,
    Opened,
    SenderEffect,
    SenderEvent,
    Sending,
    SendPiece,
    SlotFree,
    Staged,
    StageFrom,
    Tell,
    Tick,
    Written,
)
from pop_node.kv_stream.faults import as_text, expired, reported, timed_out, violation
from pop_node.kv_stream.frames import (
    CODEC_RAW,
    MAX_COMMIT_IDS,
    Abort,
    Ack,
    Deny,
    Done,
    Grant,
)
from pop_node.kv_stream.outgoing import RESUME_VERSION, Link, Outgoing, SenderCounts
from wire.errors import MeshError, PeerError, TransferError, error_from_code


class Sender:
    """All outgoing transfers of one node."""

    def __init__(self) -> None:
        self.counts = SenderCounts()
        self._transfers: dict[bytes, Outgoing] = {}
        self._links: dict[str, Link] = {}
        self._writing: set[int] = set()

    def __len__(self) -> int:
        return len(self._transfers)

    def transfers(self) -> list[bytes]:
        """Ids of the transfers under way."""
        return list(self._transfers)

    def is_open(self, transfer: bytes) -> bool:
        """False once the transfer ended: its queued pieces need not be written any more."""
        return transfer in self._transfers

    @property
    def slots_held(self) -> int:
        """Export slots that were staged and not given back yet."""
        return len(self._writing) + sum(len(t.queue) for t in self._transfers.values())

    def next_deadline(self) -> float | None:
        """When ``Tick`` is due; None when nothing waits."""
        waits = [self._deadline(transfer) for transfer in self._transfers.values()]
        waits += [link.redial_at for link in self._links.values() if link.redial_at is not None]
        return min(waits, default=None)

    def handle(self, event: SenderEvent, now: float) -> list[SenderEffect]:
        """Advance by one event.

        Raises ``ValueError`` for an ``Opened`` whose transfer is under way.
        """
        match event:
            case Opened():
                return self._open(event, now)
            case LinkUp():
                return self._link_up(event, now)
            case LinkDown():
                return self._link_down(event, now)
            case LinkRtt(address, rtt_s):
                self._link(address).rtt_s = rtt_s
                return []
            case FromPeer(address, message):
                return self._from_peer(address, message, now)
            case Written(slot):
                if slot not in self._writing:
                    return []
                self._writing.remove(slot)
                return [SlotFree(slot)]
            case EngineLost(model):
                error = PeerError(f"the engine of {model} died", code="engine_died")
                gone = [t for t in self._transfers.values() if t.opened.model == model]
                return [e for t in gone for e in self._fail(t, error)]
            case Tick():
                return self._tick(now)
            case _:
                return self._from_agent(event, now)

    def _from_agent(
        self,
        event: Staged | Sending | CommitReady | ComputeStarted | ComputeEnded | Cancelled,
        now: float,
    ) -> list[SenderEffect]:
        transfer = self._transfers.get(event.transfer)
        if transfer is None:  # ended while this was on its way
            return [SlotFree(event.slot)] if isinstance(event, Staged) else []
        match event:
            case Staged():
                return self._staged(transfer, event, now)
            case Sending(_, nbytes, wire_bytes, codec):
                self.counts.sent_bytes += nbytes
                self.counts.sent_wire_bytes += wire_bytes
                self.counts.packed_pieces += codec != CODEC_RAW
                self.counts.raw_pieces += codec == CODEC_RAW
                transfer.meter.sent(wire_bytes, now)
            case CommitReady(_, ids):
                if not 1 <= len(ids) <= MAX_COMMIT_IDS:
                    error = TransferError(f"a Commit of {len(ids)} ids", retryable=False)
                    return self._fail(transfer, error)
                transfer.ids, transfer.moved_at = ids, now
                return self._push(transfer, now)
            case ComputeStarted():
                transfer.meter.compute_started(now)
            case ComputeEnded():
                transfer.meter.compute_ended(now)
            case Cancelled(_, code, message):
                return self._fail(transfer, error_from_code(code, message))
        return []

    # ---- opening -------------------------------------------------------------------------------

    def _open(self, event: Opened, now: float) -> list[SenderEffect]:
        if event.transfer in self._transfers:
            raise ValueError("transfer id in use")
        transfer = Outgoing(event, waiting_since=now)
        self._transfers[event.transfer] = transfer
        self.counts.opened += 1
        link = self._link(event.address)
        transfer.is_late = link.is_dialled
        effects: list[SenderEffect] = [self._dial(event.address, event.peer)]
        if link.slot_bytes:
            effects.append(self._say_open(transfer, now))
        return effects

    def _dial(self, address: str, peer: str) -> Connect:
        link = self._link(address)
        link.redial_at, link.is_dialled = None, True
        return Connect(address, peer)

    def _link_up(self, up: LinkUp, now: float) -> list[SenderEffect]:
        link = self._link(up.address)
        link.slot_bytes = up.slot_bytes
        link.incarnation = up.incarnation if up.version >= RESUME_VERSION else ""
        link.last_ack = link.up_since = now
        effects: list[SenderEffect] = []
        for transfer in self._on(up.address):
            if transfer.state != "connecting":
                continue
            if transfer.incarnation not in ("", link.incarnation):
                error = TransferError(f"{transfer.opened.peer} was restarted")
                effects += self._fail(transfer, error)
                continue
            effects.append(self._say_open(transfer, now))
        return effects

    def _link_down(self, down: LinkDown, now: float) -> list[SenderEffect]:
        address, error = down.address, down.error
        old = self._links.pop(address, Link())
        effects: list[SenderEffect] = []
        waiting = at_once = False
        for transfer in self._on(address):
            if transfer.may_resume(error):
                waiting, at_once = True, at_once or transfer.is_late
                slots = transfer.break_off(old, now, is_silent=down.is_silent)
                effects += [SlotFree(slot) for slot in slots]
            else:
                effects += self._fail(transfer, error, tell_peer=False)
        if waiting:
            self._links[address] = old.successor(now, at_once=at_once)
            effects += self._redial(now)
        return effects

    def _redial(self, now: float) -> list[SenderEffect]:
        """Dial what is due; forget links that nobody waits for any more."""
        effects: list[SenderEffect] = []
        for address, link in list(self._links.items()):
            if link.redial_at is None or now < link.redial_at:
                continue
            peers = [transfer.opened.peer for transfer in self._on(address)]
            if peers:
                effects.append(self._dial(address, peers[0]))
            else:
                del self._links[address]
        return effects

    def _on(self, address: str) -> list[Outgoing]:
        return [t for t in self._transfers.values() if t.opened.address == address]

    def _say_open(self, transfer: Outgoing, now: float) -> Tell:
        transfer.state, transfer.moved_at, transfer.is_late = "opening", now, False
        transfer.incarnation = self._link(transfer.opened.address).incarnation
        return Tell(transfer.opened.address, transfer.open_frame())

    # ---- what the decode node says -------------------------------------------------------------

    def _from_peer(
        self, address: str, message: Grant | Deny | Ack | Done | Abort, now: float
    ) -> list[SenderEffect]:
        transfer = self._transfers.get(message.transfer)
        if (
            transfer is None
            or transfer.opened.attempt != message.attempt
            or transfer.opened.address != address
        ):
            self.counts.late_frames += 1
            return []
        match message:
            case Grant():
                return self._granted(transfer, message, now)
            case Ack():
                return self._acked(transfer, message, now)
            case Deny(_, _, code, text, retryable):
                self.counts.denied += 1
                return self._fail(transfer, reported(code, text, retryable), tell_peer=False)
            case Abort(_, _, code, text):
                return self._fail(transfer, reported(code, text), tell_peer=False)
            case Done():
                return self._done(transfer, now)

    def _granted(self, transfer: Outgoing, grant: Grant, now: float) -> list[SenderEffect]:
        if transfer.state != "opening":
            return self._fail(transfer, violation("a Grant that nobody waits for"))
        was_granted, transfer.moved_at = transfer.was_granted, now
        wrong = transfer.take_grant(grant)
        if wrong is not None:
            return self._fail(transfer, violation(wrong))
        if was_granted:
            self.counts.resumed += 1
            rtt_s = self._link(transfer.opened.address).rtt_s
            transfer.meter.acked(transfer.sure_bytes, rtt_s, now)
        arrived = tuple(grant.arrived)
        stage = StageFrom(transfer.opened.transfer, grant.have_tokens, arrived, transfer.resume)
        return [stage, *self._push(transfer, now)]

    def _acked(self, transfer: Outgoing, ack: Ack, now: float) -> list[SenderEffect]:
        if transfer.state not in ("granted", "committing"):
            return self._fail(transfer, violation("an Ack before the Grant"))
        if not transfer.acked_bytes <= ack.received_bytes <= transfer.sent_bytes:
            return self._fail(transfer, violation("an Ack for bytes that were not sent"))
        link = self._link(transfer.opened.address)
        if ack.received_bytes > transfer.acked_bytes:
            transfer.acked_bytes = ack.received_bytes
            link.last_ack, link.failures = now, 0
            received = transfer.sure_bytes + ack.received_bytes
            transfer.meter.acked(received, link.rtt_s, now)
        transfer.credit_bytes += ack.credit_bytes_returned
        transfer.moved_at = now
        return self._push(transfer, now)

    def _done(self, transfer: Outgoing, now: float) -> list[SenderEffect]:
        # Opened again, it may hear that its Commit had arrived the time before.
        ended = transfer.state == "opening" and transfer.was_committed
        acked = transfer.state == "committing" and transfer.acked_bytes == transfer.sent_bytes
        if not (ended or acked):
            return self._fail(transfer, violation("a Done before the end"))
        del self._transfers[transfer.opened.transfer]
        self.counts.delivered += 1
        rtt_s = self._link(transfer.opened.address).rtt_s
        if ended:
            transfer.meter.acked(transfer.coverage.nbytes(), rtt_s, now)
        return [Delivered(transfer.opened.transfer, transfer.meter.report(rtt_s))]

    # ---- sending -------------------------------------------------------------------------------

    def _staged(self, transfer: Outgoing, event: Staged, now: float) -> list[SenderEffect]:
        stale = event.resume != transfer.resume or (
            transfer.was_granted and transfer.state in ("connecting", "opening")
        )
        if stale:  # staged before the link broke, or while it is away; the Grant says what is due
            return [SlotFree(event.slot)]
        wrong = transfer.refuse_staged(event, self._link(transfer.opened.address).slot_bytes)
        if wrong is not None:
            error = TransferError(f"cannot send a piece: {wrong}")
            return [SlotFree(event.slot), *self._fail(transfer, error)]
        transfer.coverage.add(event.piece)
        transfer.queue.append(event)
        return self._push(transfer, now)

    def _push(self, transfer: Outgoing, now: float) -> list[SenderEffect]:
        """Send what credit allows; commit when everything needed has been sent."""
        effects: list[SenderEffect] = []
        if transfer.state != "granted":
            return effects
        opened = transfer.opened
        slot_bytes = self._link(opened.address).slot_bytes
        while transfer.queue and transfer.credit_bytes >= slot_bytes:
            staged = transfer.queue.popleft()
            transfer.credit_bytes -= slot_bytes
            if transfer.sent_bytes == transfer.acked_bytes:
                transfer.unacked_since = now
            transfer.sent_bytes += staged.nbytes
            self._writing.add(staged.slot)
            effects.append(
                SendPiece(
                    opened.address,
                    opened.transfer,
                    opened.attempt,
                    staged.slot,
                    staged.piece,
                    staged.nbytes,
                    transfer.packs_as(staged.piece),
                )
            )
        commit = transfer.commit_frame()
        if commit is not None:
            transfer.state, transfer.was_committed = "committing", True
            effects.append(Tell(opened.address, commit))
        return effects

    # ---- ending --------------------------------------------------------------------------------

    def _deadline(self, transfer: Outgoing) -> float:
        return transfer.deadline(self._link(transfer.opened.address))

    def _tick(self, now: float) -> list[SenderEffect]:
        effects = [e for t in list(self._transfers.values()) for e in self._expire(t, now)]
        return effects + self._redial(now)

    def _expire(self, transfer: Outgoing, now: float) -> list[SenderEffect]:
        if now >= transfer.opened.deadline:
            return self._fail(transfer, expired())
        if now >= self._deadline(transfer):
            what = {"connecting": "no link", "opening": "no grant"}.get(transfer.state, "no room")
            if transfer.acked_bytes < transfer.sent_bytes:
                what = "no acknowledgement"
            return self._fail(transfer, timed_out(f"{what} of {transfer.opened.peer} in time"))
        return []

    def _fail(
        self, transfer: Outgoing, error: MeshError, *, tell_peer: bool = True
    ) -> list[SenderEffect]:
        opened = transfer.opened
        del self._transfers[opened.transfer]
        self.counts.failed += 1
        effects: list[SenderEffect] = [SlotFree(staged.slot) for staged in transfer.queue]
        if tell_peer and transfer.state != "connecting":
            abort = Abort(opened.transfer, opened.attempt, *as_text(error))
            effects.append(Tell(opened.address, abort))
        effects.append(Failed(opened.transfer, error))
        return effects

    def _link(self, address: str) -> Link:
        return self._links.setdefault(address, Link())
