"""A simulated KV endpoint: the real sender and receiver over simulated connections.

Stands in for ``kv_stream.endpoint`` and ``intake``.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from msgspec.structs import replace

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import (
    CODEC_PACKED,
    CODEC_RAW,
    Abort,
    Commit,
    Data,
    Hello,
    Open,
    data_checksum,
)
from pop_node.kv_stream.interface import KvEvents
from pop_node.kv_stream.links import link_key
from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.sender import Sender
from pop_node.kv_stream.spec import KvSpec, Piece
from tests.sim.clock import Process, cancel
from tests.sim.engine_shell import SimStaging
from tests.sim.kv_conn import KvConn, Mangler, PieceFrame
from tests.sim.kv_link import SimPeerLink
from tests.sim.links import End, Network
from tests.sim.model import WIDTH
from wire.errors import MeshError, PeerError
from wire.messages import LinkRate

UNPACK_S = 0.02
"""A thread on a machine that is busy: many events happen meanwhile."""

HALF_UNPACKED = b"\xdd" * WIDTH
"""What lies in a slot until then; its block is as it was, which makes the codec a fake."""


class SimKvEndpoint:
    """All transfers of one engine generation."""

    def __init__(
        self,
        process: Process,
        network: Network,
        hello: Hello,
        staging: SimStaging,
        events: KvEvents,
        mangler: Mangler | None,
    ) -> None:
        self.process = process
        self.network = network
        self.hello = hello
        self.staging = staging
        self.mangler = mangler
        self.events = events
        layout = staging.layout
        self.sender = Sender()
        self.receiver = Receiver(layout.export_slots, layout.import_slots, layout.slot_bytes)
        self.links: dict[str, SimPeerLink] = {}
        self.accepted: dict[int, KvConn] = {}
        knows_packing = sum(hello.name.encode()) % 4 > 0
        self.codecs = (CODEC_PACKED, CODEC_RAW) if knows_packing else (CODEC_RAW,)
        self.closed = False
        self._address = ""
        self._numbers = 0
        self._link_numbers = 0
        self._pending: deque[tuple[bool, Any, float]] = deque()
        self._draining = False
        self._must_arm = False
        self._into: int | None = None
        self._timer: Any = None
        self._wake_at: float | None = None

    def listen(self, address: str) -> None:
        """Take connections from now on."""
        self._address = address
        self.network.listen(address, self.process.host, self)

    def close(self) -> None:
        """End every transfer and connection."""
        gone = PeerError("the node shuts down", code="link_lost")
        for transfer in [*self.sender.transfers(), *self.receiver.transfers()]:
            self.cancel(transfer, "draining", gone.message)
        found = self.network.listeners.get(self._address)
        if found is not None and found[1] is self:
            del self.network.listeners[self._address]
        for link in list(self.links.values()):
            link.close(gone)
        for conn in list(self.accepted.values()):
            conn.fail(gone)
        self.closed = True
        cancel(self._timer)

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    # ---- calls of the node, as of ``KvEndpoint`` -----------------------------------------------

    def open(
        self,
        transfer_id: bytes,
        attempt: int,
        peer: str,
        address: str,
        model: str,
        identity: str,
        spec: KvSpec,
        prompt_tokens: int,
        prompt_digest: bytes,
        deadline_s: float,
    ) -> None:
        key, deadline = link_key(peer, address), self.process.time() + deadline_s
        same = (model, identity, spec, prompt_tokens, prompt_digest, deadline)
        self.to_sender(ev.Opened(transfer_id, attempt, peer, key, *same, self.codecs))

    def expect(
        self,
        transfer_id: bytes,
        attempt: int,
        peer: str,
        model: str,
        identity: str,
        spec: KvSpec,
        prompt_tokens: int,
        prompt_digest: bytes,
        deadline_s: float,
    ) -> None:
        deadline = self.process.time() + deadline_s
        same = (model, identity, spec, prompt_tokens, prompt_digest, deadline)
        self.to_receiver(ev.Expected(transfer_id, attempt, peer, *same, codecs=self.codecs))

    def compute_started(self, transfer: bytes) -> None:
        self.to_sender(ev.ComputeStarted(transfer))

    def compute_ended(self, transfer: bytes) -> None:
        self.to_sender(ev.ComputeEnded(transfer))

    def staged(
        self, transfer: bytes, slot: int, piece: Piece, nbytes: int, resume: int = 0
    ) -> None:
        self.to_sender(ev.Staged(transfer, slot, piece, nbytes, resume))

    def commit(self, transfer: bytes, ids: list[int]) -> None:
        self.to_sender(ev.CommitReady(transfer, tuple(ids)))

    def allocated(self, transfer: bytes, have_tokens: int) -> None:
        self.to_receiver(ev.Allocated(transfer, have_tokens))

    def starving(self, is_starving: bool) -> None:
        self.to_receiver(ev.Starving(is_starving))

    def imported(self, transfer: bytes, slot: int) -> None:
        self.to_receiver(ev.Imported(slot))

    def kept_tokens(self, transfer: bytes) -> int:
        return 0 if self._draining else self.receiver.kept_tokens(transfer)

    def cancel(self, transfer: bytes, code: str, message: str) -> None:
        self.to_sender(ev.Cancelled(transfer, code, message))
        self.to_receiver(ev.Cancelled(transfer, code, message))

    def engine_lost(self, model: str) -> None:
        self.to_sender(ev.EngineLost(model))
        self.to_receiver(ev.EngineLost(model))

    def link_rates(self) -> list[LinkRate]:
        return [LinkRate(link.peer, link.rtt_s * 1e3, 0.0) for link in self.links.values()]

    # ---- events in, effects out ----------------------------------------------------------------

    def to_sender(self, event: ev.SenderEvent) -> None:
        self._must_arm |= not isinstance(event, ev.HOT_EVENTS)
        self._pending.append((True, event, self.process.time()))
        self._drain()

    def to_receiver(self, event: ev.ReceiverEvent) -> None:
        self._must_arm |= not isinstance(event, ev.HOT_EVENTS)
        self._pending.append((False, event, self.process.time()))
        self._drain()

    def begin(self, event: ev.DataBegins) -> int | None:
        """The slot for a payload."""
        assert not self._draining
        self._into = None
        self.to_receiver(event)
        return self._into

    def _drain(self) -> None:
        if self._draining:
            return
        self._draining = True
        while self._pending:
            is_sender, event, now = self._pending.popleft()
            if is_sender:
                self._step_sender(event, now)
            else:
                self._step_receiver(event, now)
        self._draining = False
        if self._must_arm:
            self._must_arm = False
            self._arm()

    def _step_sender(self, event: Any, now: float) -> None:
        if isinstance(event, ev.LinkDown):
            self.links.pop(event.address, None)
        for effect in self.sender.handle(event, now):
            match effect:
                case ev.Connect(key, peer):
                    self._connect(key, peer)
                case ev.Tell(key, message):
                    if key in self.links:
                        self.links[key].tell(message)
                case ev.SendPiece(key):
                    self.links[key].send_piece(effect)
                case ev.StageFrom(transfer, have_tokens, arrived, resume):
                    self.events.on_stage_from(transfer, have_tokens, list(arrived), resume)
                case ev.SlotFree(slot):
                    self.events.on_slot_free(slot)
                case ev.Delivered(transfer, report):
                    self.events.on_done(transfer, report)
                case ev.Failed(transfer, error):
                    self.events.on_failed(transfer, error, 0)
                case _:
                    raise AssertionError(f"unknown effect {effect}")

    def _step_receiver(self, event: Any, now: float) -> None:
        for effect in self.receiver.handle(event, now):
            match effect:
                case ev.Reply(number, message):
                    conn = self.accepted.get(number)
                    if conn is not None:
                        conn.send(message)
                case ev.ReceiveInto(slot):
                    self._into = slot
                case ev.Unpack(slot):
                    block, self.staging.slots[slot] = self.staging.slots[slot], HALF_UNPACKED
                    self.process.call_later(UNPACK_S, self._unpacked, slot, block)
                case ev.Import(transfer, slot, piece):
                    self.events.on_import(transfer, slot, piece)
                case ev.Committed(transfer, ids):
                    self.events.on_committed(transfer, list(ids))
                case ev.Failed(transfer, error, kept_tokens):
                    self.events.on_failed(transfer, error, kept_tokens)
                case _:
                    raise AssertionError(f"unknown effect {effect}")

    def _unpacked(self, slot: int, block: bytes) -> None:
        self.staging.slots[slot] = block
        self.to_receiver(ev.Unpacked(slot, True))

    def _connect(self, key: str, peer: str) -> None:
        if key not in self.links:
            self._link_numbers += 1
            hello = replace(self.hello, link=self._link_numbers)
            link = self.links[key] = SimPeerLink(self, key, peer, hello)
            link.dial(key.rpartition(" ")[2])

    def _arm(self) -> None:
        waits = (self.sender.next_deadline(), self.receiver.next_deadline())
        wake_at = min((at for at in waits if at is not None), default=None)
        if wake_at == self._wake_at:
            return
        cancel(self._timer)
        self._wake_at = None if self.closed else wake_at
        if self._wake_at is not None:
            self._timer = self.process.call_at(self._wake_at, self._on_timer)

    def _on_timer(self) -> None:
        self._wake_at = None
        self.to_sender(ev.Tick())
        self.to_receiver(ev.Tick())

    # ---- accepted connections (``kv_stream.intake``) -------------------------------------------

    def accept(self, end: End) -> None:
        conn = KvConn(self.number(), self, self.process, end, self.hello, self.staging, None)
        if self.closed:
            end.close()
            return
        self.accepted[conn.number] = conn
        conn.start()

    def admit(self, conn: KvConn, hello: Hello) -> None:
        """Everybody's name is proven here."""

    def on_message(self, conn: KvConn, message: Any) -> None:
        assert isinstance(message, Open | Commit | Abort)
        assert conn.peer is not None
        self.to_receiver(ev.FrameIn(conn.number, conn.peer.name, message, conn.link))

    def on_data(self, conn: KvConn, data: Data, nbytes: int) -> int | None:
        assert conn.peer is not None
        return self.begin(ev.DataBegins(conn.number, conn.peer.name, data, nbytes, conn.link))

    def on_progress(self, conn: KvConn, slot: int, nbytes: int) -> None:
        self.to_receiver(ev.DataMoved(slot, nbytes))

    def on_payload(self, conn: KvConn, data: Data, slot: int, content: bytes) -> None:
        checksum = data_checksum(data.transfer, data.attempt, data.piece, data.codec, content)
        self.to_receiver(ev.DataEnded(slot, checksum))

    def on_rtt(self, conn: KvConn, rtt_s: float) -> None:
        self.to_receiver(ev.ConnRtt(conn.number, rtt_s))

    def next_piece(self, conn: KvConn) -> PieceFrame | None:
        return None

    def on_written(self, conn: KvConn, slot: int) -> None:
        raise AssertionError("a decode node sends no pieces")

    def on_lost(self, conn: KvConn, error: MeshError) -> None:
        self.accepted.pop(conn.number, None)
        self.to_receiver(ev.ConnLost(conn.number, error, conn.is_silent))
