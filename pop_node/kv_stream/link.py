"""The prefill side's connections to one decode node: dialling, striping, measuring.

Pieces of all transfers wait in one queue; whichever connection can write takes the next one, so the
faster stripe carries more. Where packing pays, a few are packed ahead of that. Control frames go
over the first connection. When one connection is lost the link is lost: what was in flight on it is
unknown. Those transfers go on over a new link.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pop_node.kv_stream.codec_threads import CodecThreads
from pop_node.kv_stream.connection import Connection, PieceFrame
from pop_node.kv_stream.events import (
    FromPeer,
    LinkDown,
    LinkRtt,
    LinkUp,
    SenderEvent,
    Sending,
    SendPiece,
    Written,
)
from pop_node.kv_stream.faults import violation
from pop_node.kv_stream.frames import (
    CODEC_PACKED,
    CODEC_RAW,
    Abort,
    Ack,
    Data,
    Deny,
    Done,
    FromReceiver,
    Grant,
    Hello,
    ToReceiver,
    data_checksum,
    encode,
    sender_decoder,
)
from pop_node.kv_stream.liveness import MIN_WAIT_S
from pop_node.kv_stream.packing import PackingRule
from pop_node.kv_stream.rates import RateMeter
from pop_node.kv_stream.staging import Staging
from wire.errors import MeshError, PeerError
from wire.messages import LinkRate

STRIPES = 2
"""Connections per link: a loss halves the window of one of them only. Guess."""

AHEAD = 2 * STRIPES
"""Pieces that are ready to be written or being packed: the next for each stripe, and another that
is packed meanwhile. More would be decided on what was measured long ago."""

Authorize = Callable[[str, ssl.SSLObject | None], None]


@dataclass(frozen=True, slots=True)
class _Ready:
    """A piece as it will be written."""

    item: SendPiece
    payload: memoryview
    codec: str


class PeerLink:
    """Owner of the connections to ``peer``; ``key`` is the link's name in the sender's events, and
    ``hello`` carries its number."""

    def __init__(
        self,
        key: str,
        peer: str,
        hello: Hello,
        staging: Staging,
        codec: CodecThreads,
        emit: Callable[[SenderEvent], None],
        is_open: Callable[[bytes], bool],
        authorize: Authorize,
        watch: Callable[[], None],
    ) -> None:
        self.key = key
        self.peer = peer
        self.connections: list[Connection[FromReceiver]] = []
        self.rates = RateMeter()
        self.rtt_s = 0.0
        self.is_up = False
        self.is_down = False
        self._hello = hello
        self._staging = staging
        self._codec = codec
        self._packing_rule = PackingRule()
        self._emit = emit
        self._is_open = is_open
        self._authorize = authorize
        self._watch = watch
        self._queue: deque[SendPiece] = deque()  # bounded by the export slots
        self._ready: deque[_Ready] = deque()  # with those being packed, at most AHEAD
        self._packing = 0
        self._loop = asyncio.get_running_loop()

    @property
    def rate(self) -> LinkRate:
        """What was measured of late."""
        return LinkRate(self.peer, self.rtt_s * 1e3, self.rates.current(time.monotonic()))

    async def dial(
        self, host: str, port: int, context: ssl.SSLContext | None, numbers: Callable[[], int]
    ) -> None:
        """Connect all stripes; the result is a ``LinkUp`` or ``LinkDown`` event."""
        name = self.peer if context is not None else None

        async def stripe() -> None:
            conn = Connection(numbers(), self, self._hello, sender_decoder())
            await self._loop.create_connection(
                lambda: conn, host, port, ssl=context, server_hostname=name
            )

        try:
            async with asyncio.timeout(MIN_WAIT_S), asyncio.TaskGroup() as dials:
                for _ in range(STRIPES):
                    dials.create_task(stripe())
        except* (OSError, TimeoutError, ValueError) as group:
            # ssl.SSLError is an OSError; a name that cannot be looked up at all is a ValueError.
            exc = group.exceptions[0]
            why = str(exc) or type(exc).__name__
            self.close(PeerError(f"cannot reach {self.peer} at {host}:{port}: {why}"))

    def tell(self, message: ToReceiver) -> None:
        """Send a control frame."""
        if self.connections:
            self.connections[0].send(message)
        if isinstance(message, Abort):
            self.rates.ended(message.transfer)

    def send_piece(self, piece: SendPiece) -> None:
        """Queue a staged piece for whichever connection is free first."""
        if self.is_down:
            self._emit(Written(piece.slot))
            return
        self._queue.append(piece)
        self._prepare()
        self._flush()

    def close(self, error: MeshError, *, is_silent: bool = False) -> None:
        """End the link: every connection goes, queued slots come back, ``LinkDown`` once."""
        if self.is_down:
            return
        self.is_down = True
        while self._queue:
            self._emit(Written(self._queue.popleft().slot))
        while self._ready:
            self._emit(Written(self._ready.popleft().item.slot))
        for conn in self.connections:
            conn.fail(error)
        self._emit(LinkDown(self.key, error, is_silent))

    # ---- what the connections say --------------------------------------------------------------

    def on_made(self, conn: Connection[FromReceiver]) -> None:
        self.connections.append(conn)
        self._watch()
        if self.is_down:
            conn.fail(PeerError("the link is given up", code="link_lost"))

    def admit(self, conn: Connection[FromReceiver], hello: Hello) -> None:
        if hello.name != self.peer:
            raise PeerError(
                f"dialled {self.peer} and reached {hello.name}", code="identity_mismatch"
            )
        self._authorize(hello.name, conn.ssl_object)
        self._check_up()

    def on_message(self, conn: Connection[FromReceiver], message: FromReceiver) -> None:
        match message:
            case Ack(transfer, _, _, received_bytes):
                self.rates.acked(transfer, received_bytes, time.monotonic())
            case Done(transfer) | Deny(transfer) | Abort(transfer):
                self.rates.ended(transfer)
            case Grant():
                pass
            case _:
                raise violation(f"an unexpected {type(message).__name__}")
        self._emit(FromPeer(self.key, message))

    def destination(
        self, conn: Connection[FromReceiver], data: Data, nbytes: int
    ) -> memoryview | None:
        raise violation("Data for a prefill node")

    def on_rtt(self, conn: Connection[FromReceiver], rtt_s: float) -> None:
        self.rtt_s = min(c.keepalive.rtt_s for c in self.connections if c.keepalive.has_rtt)
        self._emit(LinkRtt(self.key, self.rtt_s))

    def next_piece(self, conn: Connection[FromReceiver]) -> PieceFrame | None:
        while True:
            self._prepare()
            if not self._ready:
                return None  # what is being packed asks again
            ready = self._ready.popleft()
            item, payload, p = ready.item, ready.payload, ready.item.piece
            if not self._is_open(item.transfer):
                self._emit(Written(item.slot))
                continue
            checksum = data_checksum(item.transfer, item.attempt, p, ready.codec, payload)
            data = Data(
                item.transfer,
                item.attempt,
                p.group,
                p.component,
                p.layer_lo,
                p.layer_hi,
                p.token_lo,
                p.token_hi,
                ready.codec,
                checksum,
            )
            head = encode(data, len(payload))
            self.rates.sent(item.transfer, item.nbytes)
            self._packing_rule.sent(item.nbytes, len(payload))
            wire_bytes = len(head) + len(payload)
            self._emit(Sending(item.transfer, item.nbytes, wire_bytes, ready.codec))
            return PieceFrame(head, payload, item.slot)

    def on_written(self, conn: Connection[FromReceiver], slot: int) -> None:
        self._emit(Written(slot))

    def on_blocked(self, conn: Connection[FromReceiver]) -> None:
        self.rates.waited()

    def on_lost(self, conn: Connection[FromReceiver], error: MeshError) -> None:
        self.close(error, is_silent=conn.is_silent)

    def _prepare(self) -> None:
        """Decide how the next pieces go, and have those packed for which it pays."""
        while self._queue and len(self._ready) + self._packing < AHEAD:
            item = self._queue.popleft()
            if not self._is_open(item.transfer):
                self._emit(Written(item.slot))
                continue
            payload = self._staging.slot(item.slot)[: item.nbytes]
            rate = self.rates.limit(time.monotonic())
            if item.dtype is None or not self._packing_rule.wants(rate):
                self._ready.append(_Ready(item, payload, CODEC_RAW))
                continue
            self._packing += 1
            self._codec.pack(payload, item.dtype, partial(self._packed, item, payload))

    def _packed(
        self, item: SendPiece, payload: memoryview, block: bytes | None, seconds: float
    ) -> None:
        self._packing -= 1
        if self.is_down:
            self._emit(Written(item.slot))
            return
        codec = CODEC_RAW
        if block is not None:
            self._packing_rule.packed(item.nbytes, len(block), seconds)
            if len(block) < item.nbytes:
                payload, codec = memoryview(block), CODEC_PACKED
        self._ready.append(_Ready(item, payload, codec))
        self._flush()

    def _flush(self) -> None:
        for conn in self.connections:
            conn.flush()

    def _check_up(self) -> None:
        peers = [conn.peer for conn in self.connections if conn.peer is not None]
        if self.is_up or self.is_down or len(peers) < STRIPES:
            return
        if len({peer.incarnation for peer in peers}) > 1:
            self.close(PeerError(f"{self.peer} restarted while it was dialled"))
            return
        self.is_up = True
        version = min(conn.version for conn in self.connections)
        slot_bytes = min(peer.slot_bytes for peer in peers)
        self._emit(LinkUp(self.key, slot_bytes, version, peers[0].incarnation))
