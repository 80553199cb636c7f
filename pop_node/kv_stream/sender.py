"""The prefill node's half of every KV transfer: a pure machine for all its transfers.

One transfer: ``Opened`` -> link -> ``Open`` sent -> ``Grant`` -> the engine stages from D's
coverage -> pieces are sent in order within the credit -> ``Commit`` once everything needed was
sent and the ids are known -> ``Done``. It ends exactly once, by ``Delivered`` or ``Failed``;
every staged slot comes back exactly once, by ``SlotFree``.

Who waits for what: the machine itself bounds the link set-up and the wait for acknowledgements of
bytes that were sent. A decode node that allocates or imports is waited for as long as its
connection answers pings (the shell reports ``LinkDown`` when it does not), and never past the
request's deadline.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from pop_node.kv_stream.coverage import Coverage, validate_piece
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
    Commit,
    Deny,
    Done,
    Grant,
    Open,
)
from pop_node.kv_stream.liveness import wait_limit_s
from pop_node.kv_stream.report import TransferMeter
from wire.errors import MeshError, PeerError, TransferError, error_from_code

State = Literal["connecting", "opening", "granted", "committing"]


@dataclass(slots=True)
class _Link:
    """What is known of one link; ``slot_bytes`` is 0 until it is up."""

    slot_bytes: int = 0
    rtt_s: float = 0.0
    last_ack: float = 0.0


@dataclass(slots=True)
class _Outgoing:
    opened: Opened
    coverage: Coverage
    started: float
    state: State = "connecting"
    credit_bytes: int = 0
    have_tokens: int = 0
    queue: deque[Staged] = field(default_factory=deque)  # bounded by the export slots
    ids: tuple[int, ...] | None = None
    sent_bytes: int = 0
    acked_bytes: int = 0
    unacked_since: float = 0.0
    meter: TransferMeter = field(default_factory=TransferMeter)


@dataclass(slots=True)
class SenderCounts:
    """Totals since the start."""

    opened: int = 0
    delivered: int = 0
    failed: int = 0
    denied: int = 0
    late_frames: int = 0
    sent_bytes: int = 0


class Sender:
    """All outgoing transfers of one node."""

    def __init__(self) -> None:
        self.counts = SenderCounts()
        self._transfers: dict[bytes, _Outgoing] = {}
        self._links: dict[str, _Link] = {}
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
        return min((self._deadline(t) for t in self._transfers.values()), default=None)

    def handle(self, event: SenderEvent, now: float) -> list[SenderEffect]:
        """Advance by one event.

        Raises ``ValueError`` for an ``Opened`` whose transfer is under way.
        """
        match event:
            case Opened():
                return self._open(event, now)
            case LinkUp(address, slot_bytes):
                return self._link_up(address, slot_bytes, now)
            case LinkDown(address, error):
                self._links.pop(address, None)
                gone = [t for t in self._transfers.values() if t.opened.address == address]
                return [e for t in gone for e in self._fail(t, error, tell_peer=False)]
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
                return [e for t in list(self._transfers.values()) for e in self._expire(t, now)]
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
            case Sending(_, nbytes, wire_bytes):
                self.counts.sent_bytes += nbytes
                transfer.meter.sent(wire_bytes, now)
            case CommitReady(_, ids):
                if not 1 <= len(ids) <= MAX_COMMIT_IDS:
                    error = TransferError(f"a Commit of {len(ids)} ids", retryable=False)
                    return self._fail(transfer, error)
                transfer.ids = ids
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
        transfer = _Outgoing(event, Coverage(event.spec), started=now)
        self._transfers[event.transfer] = transfer
        self.counts.opened += 1
        effects: list[SenderEffect] = [Connect(event.address, event.peer)]
        if self._link(event.address).slot_bytes:
            effects.append(self._say_open(transfer))
        return effects

    def _link_up(self, address: str, slot_bytes: int, now: float) -> list[SenderEffect]:
        link = self._link(address)
        link.slot_bytes, link.last_ack = slot_bytes, now
        waiting = [
            t
            for t in self._transfers.values()
            if t.opened.address == address and t.state == "connecting"
        ]
        return [self._say_open(transfer) for transfer in waiting]

    def _say_open(self, transfer: _Outgoing) -> Tell:
        transfer.state = "opening"
        o = transfer.opened
        message = Open(
            o.transfer,
            o.attempt,
            o.model,
            o.identity,
            o.spec.digest(),
            o.prompt_tokens,
            o.prompt_digest,
            [CODEC_RAW],
        )
        return Tell(o.address, message)

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

    def _granted(self, transfer: _Outgoing, grant: Grant, now: float) -> list[SenderEffect]:
        if transfer.state != "opening":
            return self._fail(transfer, violation("a Grant that nobody waits for"))
        if grant.codec != CODEC_RAW or grant.have_tokens > transfer.opened.prompt_tokens:
            return self._fail(transfer, violation("a Grant that does not fit its Open"))
        transfer.state = "granted"
        transfer.credit_bytes = grant.credit_bytes
        transfer.have_tokens = grant.have_tokens
        effects: list[SenderEffect] = [StageFrom(transfer.opened.transfer, grant.have_tokens)]
        return effects + self._push(transfer, now)

    def _acked(self, transfer: _Outgoing, ack: Ack, now: float) -> list[SenderEffect]:
        if transfer.state not in ("granted", "committing"):
            return self._fail(transfer, violation("an Ack before the Grant"))
        if not transfer.acked_bytes <= ack.received_bytes <= transfer.sent_bytes:
            return self._fail(transfer, violation("an Ack for bytes that were not sent"))
        link = self._link(transfer.opened.address)
        if ack.received_bytes > transfer.acked_bytes:
            transfer.acked_bytes = ack.received_bytes
            link.last_ack = now
            transfer.meter.acked(ack.received_bytes, link.rtt_s, now)
        transfer.credit_bytes += ack.credit_bytes_returned
        return self._push(transfer, now)

    def _done(self, transfer: _Outgoing, now: float) -> list[SenderEffect]:
        if transfer.state != "committing" or transfer.acked_bytes < transfer.sent_bytes:
            return self._fail(transfer, violation("a Done before the end"))
        del self._transfers[transfer.opened.transfer]
        self.counts.delivered += 1
        rtt_s = self._link(transfer.opened.address).rtt_s
        return [Delivered(transfer.opened.transfer, transfer.meter.report(rtt_s))]

    # ---- sending -------------------------------------------------------------------------------

    def _staged(self, transfer: _Outgoing, event: Staged, now: float) -> list[SenderEffect]:
        opened, piece = transfer.opened, event.piece
        wrong = validate_piece(opened.spec, piece)
        if transfer.state != "granted":
            wrong = "staged before the Grant or after the Commit"
        elif wrong is None and event.nbytes != piece.nbytes(opened.spec):
            wrong = f"{event.nbytes} bytes staged for a piece of {piece.nbytes(opened.spec)}"
        elif wrong is None and piece.token_lo < transfer.have_tokens:
            wrong = f"token {piece.token_lo} staged; the peer has {transfer.have_tokens}"
        elif wrong is None and transfer.coverage.overlaps(piece):
            wrong = "staged twice"
        elif wrong is None and event.nbytes > self._link(opened.address).slot_bytes:
            wrong = f"a piece of {event.nbytes} bytes does not fit the peer's staging slots"
        if wrong is not None:
            error = TransferError(f"cannot send a piece: {wrong}")
            return [SlotFree(event.slot), *self._fail(transfer, error)]
        transfer.coverage.add(piece)
        transfer.queue.append(event)
        return self._push(transfer, now)

    def _push(self, transfer: _Outgoing, now: float) -> list[SenderEffect]:
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
                )
            )
        if transfer.ids is not None and not transfer.queue:
            total = opened.prompt_tokens + len(transfer.ids) - 1
            if transfer.coverage.complete(transfer.have_tokens, total):
                transfer.state = "committing"
                commit = Commit(
                    opened.transfer, opened.attempt, list(transfer.ids), opened.prompt_digest
                )
                effects.append(Tell(opened.address, commit))
        return effects

    # ---- ending --------------------------------------------------------------------------------

    def _deadline(self, transfer: _Outgoing) -> float:
        """The earlier of the request's deadline and the end of the wait for progress."""
        deadline = transfer.opened.deadline
        link = self._link(transfer.opened.address)
        if transfer.state == "connecting":
            return min(deadline, transfer.started + wait_limit_s(link.rtt_s))
        if transfer.acked_bytes < transfer.sent_bytes:
            # Pieces of other transfers share the link: their acknowledgements are progress too.
            progress = max(transfer.unacked_since, link.last_ack)
            return min(deadline, progress + wait_limit_s(link.rtt_s))
        return deadline

    def _expire(self, transfer: _Outgoing, now: float) -> list[SenderEffect]:
        if now >= transfer.opened.deadline:
            return self._fail(transfer, expired())
        if now >= self._deadline(transfer):
            what = "no link" if transfer.state == "connecting" else "no acknowledgement"
            return self._fail(transfer, timed_out(f"{what} to {transfer.opened.peer} in time"))
        return []

    def _fail(
        self, transfer: _Outgoing, error: MeshError, *, tell_peer: bool = True
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

    def _link(self, address: str) -> _Link:
        return self._links.setdefault(address, _Link())
