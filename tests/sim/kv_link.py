"""The dialled connections to one decode node, simulated; stands in for ``kv_stream.link``."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.faults import violation
from pop_node.kv_stream.frames import (
    CODEC_PACKED,
    CODEC_RAW,
    Abort,
    Ack,
    Data,
    Deny,
    Done,
    Grant,
    Hello,
    data_checksum,
)
from pop_node.kv_stream.link import STRIPES
from pop_node.kv_stream.liveness import MIN_WAIT_S
from pop_node.kv_stream.sender import Sender
from pop_node.kv_stream.spec import Piece
from tests.sim.clock import Process, cancel
from tests.sim.engine_shell import SimStaging
from tests.sim.kv_conn import KvConn, Mangler, PieceFrame
from tests.sim.links import Dial, End, Network
from wire.errors import MeshError, PeerError


class Endpoint(Protocol):
    """The endpoint that a link belongs to."""

    process: Process
    network: Network
    staging: SimStaging
    mangler: Mangler | None
    sender: Sender

    def number(self) -> int: ...

    def to_sender(self, event: ev.SenderEvent) -> None: ...


class SimPeerLink:
    """See the module. What goes over the second connection may overtake the first."""

    def __init__(self, endpoint: Endpoint, key: str, peer: str, hello: Hello) -> None:
        self.key = key
        self.peer = peer
        self.rtt_s = 0.0
        self.is_up = False
        self.is_down = False
        self.connections: list[KvConn] = []
        self._endpoint = endpoint
        self._hello = hello
        self._queue: deque[ev.SendPiece] = deque()
        self._dials: list[Dial] = []
        self._timeout: Any = None

    def dial(self, address: str) -> None:
        endpoint = self._endpoint
        for _ in range(STRIPES):
            self._dials.append(endpoint.network.connect(endpoint.process, address, self._connected))
        self._timeout = endpoint.process.call_later(MIN_WAIT_S, self._dial_timeout)

    def _dial_timeout(self) -> None:
        if len(self.connections) < STRIPES:
            self.close(PeerError(f"cannot reach {self.peer}: timeout", code="link_lost"))

    def _connected(self, end: End | None) -> None:
        if end is None:
            self.close(PeerError(f"cannot reach {self.peer}: refused"))
            return
        endpoint = self._endpoint
        if self.is_down:
            end.close()
            return
        conn = KvConn(
            endpoint.number(),
            self,
            endpoint.process,
            end,
            self._hello,
            endpoint.staging,
            endpoint.mangler,
        )
        self.connections.append(conn)
        if len(self.connections) == STRIPES:
            cancel(self._timeout)
        conn.start()

    def tell(self, message: Any) -> None:
        if self.connections:
            self.connections[0].send(message)

    def send_piece(self, piece: ev.SendPiece) -> None:
        if self.is_down:
            self._endpoint.to_sender(ev.Written(piece.slot))
            return
        self._queue.append(piece)
        for conn in self.connections:
            conn.flush()

    def close(self, error: MeshError, *, is_silent: bool = False) -> None:
        if self.is_down:
            return
        self.is_down = True
        cancel(self._timeout)
        for dial in self._dials:
            dial.cancelled = True
        while self._queue:
            self._endpoint.to_sender(ev.Written(self._queue.popleft().slot))
        for conn in self.connections:
            conn.fail(error)
        self._endpoint.to_sender(ev.LinkDown(self.key, error, is_silent))

    # ---- what the connections say --------------------------------------------------------------

    def admit(self, conn: KvConn, hello: Hello) -> None:
        if hello.name != self.peer:
            raise PeerError(f"dialled {self.peer}, reached {hello.name}", code="identity_mismatch")
        peers = [c.peer for c in self.connections if c.peer is not None]
        if self.is_up or self.is_down or len(peers) < STRIPES:
            return
        if len({peer.incarnation for peer in peers}) > 1:
            self.close(PeerError(f"{self.peer} restarted while it was dialled"))
            return
        self.is_up = True
        slot_bytes = min(peer.slot_bytes for peer in peers)
        version = min(conn.version for conn in self.connections)
        up = ev.LinkUp(self.key, slot_bytes, version, peers[0].incarnation)
        self._endpoint.to_sender(up)

    def on_message(self, conn: KvConn, message: Any) -> None:
        assert isinstance(message, Grant | Deny | Ack | Done | Abort)
        self._endpoint.to_sender(ev.FromPeer(self.key, message))

    def on_data(self, conn: KvConn, data: Data, nbytes: int) -> int | None:
        raise violation("Data for a prefill node")

    def on_progress(self, conn: KvConn, slot: int, nbytes: int) -> None:
        raise AssertionError("no payload is taken here")

    def on_payload(self, conn: KvConn, data: Data, slot: int, content: bytes) -> None:
        raise AssertionError("no payload is taken here")

    def on_rtt(self, conn: KvConn, rtt_s: float) -> None:
        self.rtt_s = min(c.keepalive.rtt_s for c in self.connections if c.keepalive.has_rtt)
        self._endpoint.to_sender(ev.LinkRtt(self.key, self.rtt_s))

    def next_piece(self, conn: KvConn) -> PieceFrame | None:
        endpoint = self._endpoint
        while self._queue:
            item = self._queue.popleft()
            if not endpoint.sender.is_open(item.transfer):
                endpoint.to_sender(ev.Written(item.slot))
                continue
            content = endpoint.staging.slots[item.slot]
            piece: Piece = item.piece
            codec, nbytes = CODEC_RAW, item.nbytes
            if item.dtype is not None:
                codec, nbytes = CODEC_PACKED, item.nbytes * 2 // 3
            checksum = data_checksum(item.transfer, item.attempt, piece, codec, content)
            data = Data(
                item.transfer,
                item.attempt,
                *piece.numbers,
                codec,
                checksum,
            )
            endpoint.to_sender(ev.Sending(item.transfer, item.nbytes, nbytes + 60, codec))
            return PieceFrame(data, item.slot, nbytes)
        return None

    def on_written(self, conn: KvConn, slot: int) -> None:
        self._endpoint.to_sender(ev.Written(slot))

    def on_lost(self, conn: KvConn, error: MeshError) -> None:
        self.close(error, is_silent=conn.is_silent)
