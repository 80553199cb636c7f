"""One simulated connection of the KV stream; stands in for ``kv_stream.connection``.

Greeting, keepalive (the real one), control frames before queued pieces, one piece in the transport
at a time, a slot reported written once its bytes are out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from pop_node.kv_stream.connection import LINK_VERSION
from pop_node.kv_stream.faults import as_text, reported, violation
from pop_node.kv_stream.frames import Data, Goodbye, Hello, Ping, Pong
from pop_node.kv_stream.liveness import Keepalive
from tests.sim.clock import Process, cancel
from tests.sim.engine_shell import SimStaging
from tests.sim.links import End
from wire.errors import MeshError, PeerError
from wire.framing import negotiate


@dataclass(frozen=True, slots=True)
class PieceFrame:
    """A data frame to be written: header, slot of its payload, bytes on the wire."""

    data: Data
    slot: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Head:
    """A data frame's header; its payload follows within ``takes_s`` of undisturbed time."""

    data: Data
    nbytes: int
    takes_s: float


@dataclass(slots=True)
class Body:
    """A payload under way; ``content`` is taken from the slot when the last byte is written."""

    nbytes: int
    slots: list[bytes]
    slot: int
    content: bytes | None = None

    def take(self) -> bytes:
        """What the sender's slot holds, the first time that this is asked."""
        if self.content is None:
            self.content = self.slots[self.slot]
        return self.content


class KvOwner(Protocol):
    """What a connection tells its side, as ``connection.Owner``."""

    def admit(self, conn: KvConn, hello: Hello) -> None: ...

    def on_message(self, conn: KvConn, message: Any) -> None: ...

    def on_data(self, conn: KvConn, data: Data, nbytes: int) -> int | None:
        """A header came; the slot of its payload, None to skip it."""

    def on_progress(self, conn: KvConn, slot: int, nbytes: int) -> None:
        """So much of the payload under way has arrived."""

    def on_payload(self, conn: KvConn, data: Data, slot: int, content: bytes) -> None: ...

    def on_rtt(self, conn: KvConn, rtt_s: float) -> None: ...

    def next_piece(self, conn: KvConn) -> PieceFrame | None: ...

    def on_written(self, conn: KvConn, slot: int) -> None: ...

    def on_lost(self, conn: KvConn, error: MeshError) -> None: ...


class Mangler(Protocol):
    """What a bad wire does to data frames (``tests.sim.faults``)."""

    def mangle(self, data: Data, content: bytes) -> list[tuple[Data, bytes | None]]:
        """Frames that arrive instead of this one; a payload of None never ends."""


class KvConn:
    """See the module. ``number`` is unique within the endpoint."""

    __slots__ = (
        "_closing",
        "_control",
        "_error",
        "_flushing",
        "_gone",
        "_hello",
        "_into",
        "_mangler",
        "_owner",
        "_process",
        "_staging",
        "_timer",
        "_writing",
        "end",
        "is_silent",
        "keepalive",
        "number",
        "peer",
        "version",
    )

    def __init__(
        self,
        number: int,
        owner: KvOwner,
        process: Process,
        end: End,
        hello: Hello,
        staging: SimStaging,
        mangler: Mangler | None,
    ) -> None:
        self.number = number
        self.peer: Hello | None = None
        self.version = 0
        self.end = end
        self.is_silent = False
        self.keepalive = Keepalive(process.time())
        self._owner = owner
        self._process = process
        self._hello = hello
        self._staging = staging
        self._mangler = mangler
        self._control: deque[Any] = deque()
        self._writing: tuple[PieceFrame, list[Body]] | None = None
        self._into: tuple[Head, int | None, float] | None = None
        self._flushing = False
        self._error: MeshError | None = None
        self._gone = False
        self._timer: Any = None
        end.handler = self

    def start(self) -> None:
        self.send(self._hello)
        self._arm()

    @property
    def link(self) -> int:
        return self.peer.link if self.peer is not None and self.version >= LINK_VERSION else 0

    def is_closing(self) -> bool:
        return self._gone or self._error is not None

    def send(self, message: Any) -> None:
        """Queue a control frame."""
        if not self.is_closing():
            self._control.append(message)
            self.flush()

    def flush(self) -> None:
        """Write what is queued, control frames first, until a piece fills the transport."""
        if self._flushing:
            return
        self._flushing = True
        while self._writing is None and not self.is_closing():
            if self._control:
                self.end.send(self._control.popleft(), 150)
            elif self.peer is None or (piece := self._owner.next_piece(self)) is None:
                break
            else:
                self._write(piece)
        self._flushing = False

    def _write(self, piece: PieceFrame) -> None:
        bodies: list[Body] = []
        frames: list[tuple[Data, bytes | None]] = [(piece.data, b"")]
        if self._mangler is not None:
            frames = self._mangler.mangle(piece.data, self._staging.slots[piece.slot])
        for data, content in frames:
            takes_s = piece.nbytes / self.end.path.bytes_per_s
            self.end.send(Head(data, piece.nbytes, takes_s), 150)
            if content is not None:
                body = Body(piece.nbytes, self._staging.slots, piece.slot, content or None)
                bodies.append(body)
                self.end.send(body, piece.nbytes)
        self._writing = piece, bodies
        sim = self._process.sim
        sim.at(self.end.busy, self._process, self._written)

    def _written(self) -> None:
        if self._gone or self._writing is None:
            return
        path = self.end.path
        if path.down:  # the socket's buffer is full until the path is up, or the connection ends
            path.waiting.append((self._process, self._written))
            return
        self._let_go()
        self.flush()

    def _let_go(self) -> None:
        if self._writing is None:
            return
        piece, bodies = self._writing
        for body in bodies:
            body.take()
        self._writing = None
        self._owner.on_written(self, piece.slot)

    def fail(self, error: MeshError) -> None:
        """Close on purpose, telling the peer why if it still reads."""
        if self.is_closing():
            return
        self._error = error
        self.end.send(Goodbye(*as_text(error)), 100)
        self.end.close()
        sim = self._process.sim
        sim.at(sim.now, self._process, self.on_lost)

    # ---- the end's handler ---------------------------------------------------------------------

    def on_message(self, message: Any) -> None:
        if self.is_closing():
            return
        now = self._process.time()
        self.keepalive.heard(now)
        try:
            self._take(message, now)
        except MeshError as error:
            self.fail(error)

    def on_lost(self) -> None:
        if self._gone:
            return
        self._gone = True
        cancel(self._timer)
        self._control.clear()
        self._let_go()
        error = self._error or PeerError("connection lost", code="link_lost")
        self._owner.on_lost(self, error)

    def _take(self, message: Any, now: float) -> None:
        if isinstance(message, Head):
            if self.peer is None:
                raise violation("Data before Hello")
            if self._into is not None:  # the payload before this frame never ended
                raise violation("undecodable frame")
            slot = self._owner.on_data(self, message.data, message.nbytes)
            self._into = message, slot, self._process.sim.now
        elif isinstance(message, Body):
            if self._into is None:
                raise violation("undecodable frame")
            (head, slot, _), self._into = self._into, None
            if slot is not None:
                content = self._staging.slots[slot] = message.take()
                self._owner.on_payload(self, head.data, slot, content)
        elif self._into is not None:
            raise violation("undecodable frame")
        elif isinstance(message, Goodbye):
            self._error = reported(message.code, message.message)
            self.end.close()
            self.on_lost()
        elif isinstance(message, Hello):
            self.peer = message
            mine, theirs = self._hello, message
            versions = (theirs.min_version, theirs.max_version)
            self.version = negotiate(mine.min_version, mine.max_version, *versions)
            self._owner.admit(self, message)
            self.keepalive.begin(now)
            self._tick()
            self.flush()
        elif isinstance(message, Ping):
            self.send(Pong(message.nonce))
        elif isinstance(message, Pong):
            if self.keepalive.pong(message.nonce, now):
                self._owner.on_rtt(self, self.keepalive.rtt_s)
        else:
            self._owner.on_message(self, message)

    # ---- keepalive -----------------------------------------------------------------------------

    def _arm(self) -> None:
        self._timer = self._process.call_at(self.keepalive.next_deadline(), self._tick)

    def _tick(self) -> None:
        cancel(self._timer)
        if self.is_closing():
            return
        now = self._process.time()
        if self.keepalive.is_dead(now):
            self.is_silent = True
            self.fail(PeerError("the peer has gone silent", code="link_lost"))
            return
        if self.peer is not None and (ping := self.keepalive.due(now)) is not None:
            self.send(ping)
        self._report_progress()
        self._arm()

    def _report_progress(self) -> None:
        """What of a payload has come so far, as far as its path moves at all."""
        head, slot, since = self._into or (None, None, 0.0)
        if head is None or slot is None or self.end.peer.path.down:
            return
        share = (self._process.sim.now - since) / head.takes_s
        filled = int(head.nbytes * min(share, 0.99))
        if filled > 0:
            self._owner.on_progress(self, slot, filled)
