"""The agent's end of all KV streams: runs the two transfer machines over real connections.

A thin shell: it turns calls and frames into events, carries out effects, and arms one timer. It
knows neither engines nor requests; the agent hears through ``KvEvents``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import assert_never

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.codec_threads import CodecThreads
from pop_node.kv_stream.connection import Connection
from pop_node.kv_stream.frames import MAX_VERSION, MIN_VERSION, FromReceiver, FromSender, Hello
from pop_node.kv_stream.intake import Intake
from pop_node.kv_stream.interface import KvEvents
from pop_node.kv_stream.link import Authorize
from pop_node.kv_stream.links import Links, link_key
from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.sender import Sender
from pop_node.kv_stream.spec import KvSpec, Piece
from pop_node.kv_stream.staging import Staging
from pop_node.kv_stream.statistics import KvStatistics, statistics
from pop_node.kv_stream.watched_tasks import WatchedTasks
from wire.address import Dialer, format_address
from wire.errors import PeerError
from wire.messages import LinkRate

log = logging.getLogger(__name__)

TIMER_GRAIN_S = 0.001
"""Added to every wait: uvloop rounds to whole milliseconds, and a timer that fires early is armed
again at once, dozens of times. Source: uvloop's ``call_later``."""


class KvEndpoint:
    """Listens for incoming transfers and dials for outgoing ones. Use from one event loop only."""

    def __init__(
        self,
        name: str,
        site: str,
        mesh: str,
        incarnation: str,
        staging: Staging,
        dialer: Dialer,
        server_ssl: ssl.SSLContext | None,
        client_ssl: ssl.SSLContext | None,
        authorize: Authorize,
        events: KvEvents,
    ) -> None:
        layout = staging.layout
        self._hello = Hello(
            MIN_VERSION, MAX_VERSION, mesh, name, site, incarnation, layout.slot_bytes
        )
        self._staging = staging
        self._server_ssl = server_ssl
        self._events = events
        self._sender = Sender()
        self._receiver = Receiver(layout.export_slots, layout.import_slots, layout.slot_bytes)
        self._pending: deque[Callable[[], None]] = deque()  # empty between calls
        self._draining = False
        self._must_arm = False
        self._into: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._wake_at: float | None = None
        self._numbers = itertools.count()
        self._is_closing = False
        self._tasks = WatchedTasks(name, events.on_broken)
        self.codec = CodecThreads(self._tasks.spawn)
        self._links = Links(
            self._hello,
            staging,
            self.codec,
            dialer,
            client_ssl,
            authorize,
            self._to_sender,
            self._sender.is_open,
            self._numbers.__next__,
            self._arm,
            self._tasks.spawn,
        )
        self._intake = Intake(
            self._hello,
            staging,
            self._to_receiver,
            self._begin,
            authorize,
            self._numbers.__next__,
            self._arm,
        )

    # ---- life ----------------------------------------------------------------------------------

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; the address really bound.

        Raises ``ConfigError`` when the address is not loopback and there is no TLS, or is taken.
        """
        self._loop = asyncio.get_running_loop()
        bound = await self._intake.listen(host, port, self._server_ssl)
        await self._tasks.start()
        self.codec.start()
        transport = "TLS over TCP" if self._server_ssl is not None else "TCP"
        log.info("KV stream: %s on %s", transport, format_address(*bound))
        return bound

    async def close(self) -> None:
        """End every transfer (``on_failed``, code "draining"), connection and task."""
        if not self._intake.listens:
            return
        gone = PeerError("the node shuts down", code="link_lost")
        for transfer in [*self._sender.transfers(), *self._receiver.transfers()]:
            with self._tasks.watch():
                self.cancel(transfer, "draining", gone.message)
        connections = self._connections()
        self._links.close(gone)
        self._intake.close(gone)
        self._links.stop_dialling()
        self._is_closing = True
        for conn in connections:
            await conn.wait_closed()
        self.codec.stop()
        await self._tasks.stop()
        await self._intake.wait_closed()
        if self._timer is not None:
            self._timer.cancel()

    # ---- prefill side --------------------------------------------------------------------------

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
        """Begin a transfer to ``peer`` at ``address``; ``deadline_s`` from now.

        Raises ``ValueError`` when the id is in use.
        """
        deadline = time.monotonic() + deadline_s
        self._to_sender(
            ev.Opened(
                transfer_id,
                attempt,
                peer,
                link_key(peer, address),
                model,
                identity,
                spec,
                prompt_tokens,
                prompt_digest,
                deadline,
                self.codec.codecs,
            )
        )

    def compute_started(self, transfer: bytes) -> None:
        """The engine began the prefill."""
        self._to_sender(ev.ComputeStarted(transfer))

    def compute_ended(self, transfer: bytes) -> None:
        """The engine finished the last layer of the last prompt token."""
        self._to_sender(ev.ComputeEnded(transfer))

    def staged(
        self, transfer: bytes, slot: int, piece: Piece, nbytes: int, resume: int = 0
    ) -> None:
        """The engine filled an export slot, for the ``on_stage_from`` of this ``resume``;
        ``on_slot_free`` gives it back."""
        self._to_sender(ev.Staged(transfer, slot, piece, nbytes, resume))

    def commit(self, transfer: bytes, ids: list[int]) -> None:
        """The output tokens before the hand-off are ``ids`` (at least one)."""
        self._to_sender(ev.CommitReady(transfer, tuple(ids)))

    # ---- decode side ---------------------------------------------------------------------------

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
        max_ids: int = 1,
    ) -> None:
        """A decode leg awaits this transfer from ``peer``; ``deadline_s`` from now.

        ``prompt_tokens`` counts all tokens that both sides were given, forced ids too; ``max_ids``
        is the most new ids that its ``Commit`` may carry. Blocks must be allocated for
        ``prompt_tokens + max_ids - 1`` tokens. Raises ``ValueError`` when the id and attempt are in
        use.
        """
        deadline = time.monotonic() + deadline_s
        self._to_receiver(
            ev.Expected(
                transfer_id,
                attempt,
                peer,
                model,
                identity,
                spec,
                prompt_tokens,
                prompt_digest,
                deadline,
                max_ids,
                self.codec.codecs,
            )
        )

    def allocated(self, transfer: bytes, have_tokens: int) -> None:
        """The engine holds blocks for everything; tokens [0, have_tokens) are cached there."""
        self._to_receiver(ev.Allocated(transfer, have_tokens))

    def starving(self, is_starving: bool) -> None:
        """Whether the engine computes nothing while sequences wait for blocks."""
        self._to_receiver(ev.Starving(is_starving))

    def imported(self, transfer: bytes, slot: int) -> None:
        """The engine answered ``on_import``: it reads the slot no more."""
        self._to_receiver(ev.Imported(slot))

    def kept_tokens(self, transfer: bytes) -> int:
        """What ``on_failed`` would say if the transfer ended now. 0 while effects are carried out:
        an ``on_import`` may still be to come."""
        return 0 if self._draining else self._receiver.kept_tokens(transfer)

    # ---- both sides ----------------------------------------------------------------------------

    def cancel(self, transfer: bytes, code: str, message: str) -> None:
        """Give a transfer up, on whichever side; nothing happens when it already ended."""
        self._to_sender(ev.Cancelled(transfer, code, message))
        self._to_receiver(ev.Cancelled(transfer, code, message))

    def engine_lost(self, model: str) -> None:
        """The engine process died: fail its transfers, take back the slots it was importing."""
        self._to_sender(ev.EngineLost(model))
        self._to_receiver(ev.EngineLost(model))

    def link_rates(self) -> list[LinkRate]:
        """Measured links from here, one per peer."""
        return self._links.rates()

    def statistics(self) -> KvStatistics:
        """Gauges and totals of this moment."""
        return statistics(self._sender, self._receiver, len(self._connections()))

    # ---- events in, effects out ----------------------------------------------------------------

    def _to_sender(self, event: ev.SenderEvent) -> None:
        self._must_arm |= not isinstance(event, ev.HOT_EVENTS)
        self._pending.append(partial(self._step_sender, event, time.monotonic()))
        self._drain()

    def _to_receiver(self, event: ev.ReceiverEvent) -> None:
        self._must_arm |= not isinstance(event, ev.HOT_EVENTS)
        self._pending.append(partial(self._step_receiver, event, time.monotonic()))
        self._drain()

    def _begin(self, event: ev.DataBegins) -> int | None:
        """The slot for a payload. Transports ask from the event loop, never inside an effect."""
        assert not self._draining
        self._into = None
        self._to_receiver(event)
        return self._into

    def _drain(self) -> None:
        """Handle queued events one after the other: effects may raise new ones."""
        if self._draining:
            return
        self._draining = True
        try:
            while self._pending:
                step = self._pending.popleft()
                if not self._tasks.is_broken:
                    step()
                    continue
                with self._tasks.watch():  # it can only end any more, as well as it may
                    step()
        finally:
            self._draining = False
        if self._must_arm:
            self._must_arm = False
            self._arm()

    def _step_sender(self, event: ev.SenderEvent, now: float) -> None:
        if isinstance(event, ev.LinkDown):
            self._links.gone(event.address, event.error)
        for effect in self._sender.handle(event, now):
            match effect:
                case ev.Connect(key, peer):
                    self._links.connect(key, peer)
                case ev.Tell(key, message):
                    self._links.tell(key, message)
                case ev.SendPiece():
                    self._links.send_piece(effect)
                case ev.StageFrom(transfer, have_tokens, arrived, resume):
                    self._events.on_stage_from(transfer, have_tokens, list(arrived), resume)
                case ev.SlotFree(slot):
                    self._events.on_slot_free(slot)
                case ev.Delivered(transfer, report):
                    self._events.on_done(transfer, report)
                case ev.Failed(transfer, error):
                    self._events.on_failed(transfer, error, 0)
                case _:
                    assert_never(effect)

    def _step_receiver(self, event: ev.ReceiverEvent, now: float) -> None:
        for effect in self._receiver.handle(event, now):
            match effect:
                case ev.Reply(number, message):
                    conn = self._intake.connections.get(number)
                    if conn is not None:
                        conn.send(message)
                case ev.ReceiveInto(slot):
                    self._into = slot
                case ev.Unpack(slot, nbytes, kv_bytes):
                    done = partial(self._unpacked, slot)
                    self.codec.unpack(self._staging.slot(slot), nbytes, kv_bytes, done)
                case ev.Import(transfer, slot, piece):
                    self._events.on_import(transfer, slot, piece)
                case ev.Committed(transfer, ids):
                    self._events.on_committed(transfer, list(ids))
                case ev.Failed(transfer, error, kept_tokens):
                    self._events.on_failed(transfer, error, kept_tokens)
                case _:
                    assert_never(effect)

    def _unpacked(self, slot: int, is_sound: bool) -> None:
        self._to_receiver(ev.Unpacked(slot, is_sound))

    # ---- the timer -----------------------------------------------------------------------------

    def _connections(self) -> list[Connection[FromReceiver] | Connection[FromSender]]:
        return [*self._links.connections(), *self._intake.connections.values()]

    def _arm(self) -> None:
        """One timer for the earliest deadline of both machines and all connections."""
        waits = [self._sender.next_deadline(), self._receiver.next_deadline()]
        waits += [c.keepalive.next_deadline() for c in self._connections() if not c.is_closing()]
        wake_at = min((at for at in waits if at is not None), default=None)
        if wake_at == self._wake_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake_at = None if self._is_closing else wake_at
        if self._wake_at is not None:
            delay_s = max(0.0, self._wake_at - time.monotonic()) + TIMER_GRAIN_S
            self._timer = self._loop.call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = self._wake_at = None
        with self._tasks.watch():
            now = time.monotonic()
            for conn in self._connections():
                conn.tick(now)
            self._intake.report_progress()
            self._to_sender(ev.Tick())
            self._to_receiver(ev.Tick())
