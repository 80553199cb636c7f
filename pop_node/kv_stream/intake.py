"""The decode side's listener and its connections: who they are, and where their payloads go."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from pop_node.kv_stream.connection import Connection, PieceFrame
from pop_node.kv_stream.events import (
    ConnLost,
    ConnRtt,
    DataBegins,
    DataEnded,
    DataMoved,
    FrameIn,
    ReceiverEvent,
)
from pop_node.kv_stream.faults import violation
from pop_node.kv_stream.frames import (
    Abort,
    Commit,
    Data,
    FromSender,
    Goodbye,
    Hello,
    Open,
    Ping,
    Pong,
    data_checksum,
    receiver_decoder,
)
from pop_node.kv_stream.link import Authorize
from pop_node.kv_stream.liveness import MIN_WAIT_S
from pop_node.kv_stream.staging import Staging
from wire.address import format_address, is_loopback
from wire.errors import ConfigError, MeshError, OverloadError

MAX_CONNECTIONS = 1024
"""Accepted at once; two from each of 500 nodes."""


@dataclass(slots=True)
class _Payload:
    """The slot that a connection's bytes go into, and how many of them were reported."""

    slot: int
    nbytes: int
    reported: int = 0


class Intake:
    """Owner of all accepted connections of one endpoint."""

    def __init__(
        self,
        hello: Hello,
        staging: Staging,
        emit: Callable[[ReceiverEvent], None],
        begin: Callable[[DataBegins], int | None],
        authorize: Authorize,
        number: Callable[[], int],
        watch: Callable[[], None],
    ) -> None:
        self.connections: dict[int, Connection[FromSender]] = {}
        self._hello = hello
        self._staging = staging
        self._emit = emit
        self._begin = begin
        self._authorize = authorize
        self._number = number
        self._watch = watch
        self._payloads: dict[int, _Payload] = {}  # under way, by connection
        self._closed_by: MeshError | None = None
        self._server: asyncio.Server | None = None

    @property
    def listens(self) -> bool:
        """From ``listen`` to the end of ``wait_closed``."""
        return self._server is not None

    async def listen(self, host: str, port: int, context: ssl.SSLContext | None) -> tuple[str, int]:
        """Accept connections; the address really bound.

        Raises ``ConfigError`` when the address is not loopback and there is no TLS, or is taken.
        """
        if context is None and not is_loopback(host):
            raise ConfigError(
                f"the KV stream listener on {host} needs TLS",
                suggestion="run 'popmesh tls init' and 'popmesh tls issue', or listen on 127.0.0.1",
            )
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self.accept,
                host,
                port,
                ssl=context,
                ssl_handshake_timeout=MIN_WAIT_S if context is not None else None,
            )
        except OSError as exc:
            raise ConfigError(f"cannot listen on {format_address(host, port)}: {exc}") from exc
        bound: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return bound

    def accept(self) -> Connection[FromSender]:
        """Protocol factory of the listening socket."""
        return Connection(self._number(), self, self._hello, receiver_decoder())

    def close(self, error: MeshError) -> None:
        """Accept no more; end all connections, and those that are still being made."""
        self._closed_by = error
        if self._server is not None:
            self._server.close()
        for conn in list(self.connections.values()):
            conn.fail(error)

    async def wait_closed(self) -> None:
        """Wait for the end of the listener, after ``close`` and the ends of its connections."""
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    def report_progress(self) -> None:
        """Say how much of the payloads under way has arrived; asked at every ping."""
        for number, payload in list(self._payloads.items()):
            filled = self.connections[number].payload_filled
            if filled > payload.reported:
                payload.reported = filled
                self._emit(DataMoved(payload.slot, filled))

    def on_made(self, conn: Connection[FromSender]) -> None:
        self.connections[conn.number] = conn
        self._watch()
        if self._closed_by is not None:  # its TLS handshake was under way at the end
            conn.fail(self._closed_by)
        elif len(self.connections) > MAX_CONNECTIONS:
            conn.fail(OverloadError(f"more than {MAX_CONNECTIONS} KV stream connections"))

    def admit(self, conn: Connection[FromSender], hello: Hello) -> None:
        self._authorize(hello.name, conn.ssl_object)

    def on_message(self, conn: Connection[FromSender], message: FromSender) -> None:
        match message:
            case Open() | Commit() | Abort():
                self._emit(FrameIn(conn.number, _peer(conn), message, conn.link))
            case Data():
                self._data_ended(conn, message)
            case Hello() | Goodbye() | Ping() | Pong():
                raise AssertionError("the connection keeps these to itself")
            case _:
                assert_never(message)

    def destination(
        self, conn: Connection[FromSender], data: Data, nbytes: int
    ) -> memoryview | None:
        slot = self._begin(DataBegins(conn.number, _peer(conn), data, nbytes, conn.link))
        if slot is None:
            return None
        self._payloads[conn.number] = _Payload(slot, nbytes)
        return self._staging.slot(slot)

    def on_rtt(self, conn: Connection[FromSender], rtt_s: float) -> None:
        self._emit(ConnRtt(conn.number, rtt_s))

    def next_piece(self, conn: Connection[FromSender]) -> PieceFrame | None:
        return None

    def on_written(self, conn: Connection[FromSender], slot: int) -> None:
        raise AssertionError("a decode node sends no pieces")

    def on_blocked(self, conn: Connection[FromSender]) -> None:
        """Acknowledgements wait in the connection's bounded queue."""

    def on_lost(self, conn: Connection[FromSender], error: MeshError) -> None:
        self.connections.pop(conn.number, None)
        self._payloads.pop(conn.number, None)
        self._emit(ConnLost(conn.number, error, conn.is_silent))

    def _data_ended(self, conn: Connection[FromSender], data: Data) -> None:
        held = self._payloads.pop(conn.number, None)
        if held is None:
            return  # it was skipped
        payload = self._staging.slot(held.slot)[: held.nbytes]
        checksum = data_checksum(data.transfer, data.attempt, data.piece, data.codec, payload)
        self._emit(DataEnded(held.slot, checksum))


def _peer(conn: Connection[FromSender]) -> str:
    if conn.peer is None:
        raise violation("a frame before Hello")
    return conn.peer.name
