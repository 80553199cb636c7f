"""One node asks another for bundles: blocking HTTP on a connection that stays open.

For threads; what arrives is checked by whoever asked for it. ``PeerSource`` is an ``Origin`` of
``pop_node.store.origin`` that can also say what there is.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse

import msgspec

from pop_node.peers.inventory import (
    MAX_CHUNKS,
    MAX_INVENTORY_BYTES,
    NAME_HEADER,
    Inventory,
)
from pop_node.peers.neighbours import Peer
from pop_node.store.origin import InterruptedReadError, Pieces
from wire.address import Dialer
from wire.errors import MeshError

STALL_S = 5.0
"""Guess: a peer that says nothing for so long is left for another; its slowest lawful pause is the
wait for its token bucket, some milliseconds."""

MIN_BYTES_PER_S = 100_000
"""Guess: a small file that comes slower is better had from somebody else."""

READ_BYTES = 64 * 1024
"""At most per read: below the size from which the allocator maps fresh memory each time (128 KiB in
glibc); reads of 256 KiB needed 1.7 times the CPU for a whole fetch."""

MAX_RETRY_AFTER_S = 30.0
"""Longest pause that a peer can ask for: a number from outside."""


class PeerBusyError(Exception):
    """Enough others take from the peer."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("busy")
        self.retry_after_s = retry_after_s


class PeerLacksError(Exception):
    """The peer does not have what was asked for."""


@dataclass(frozen=True, slots=True)
class Dialing:
    """How this node calls others: its name, where addresses lead, and its certificates if any.

    ``check`` raises ``PeerError`` unless the far end is the node of that name.
    """

    name: str
    dialer: Dialer
    context: ssl.SSLContext | None
    check: Callable[[str, ssl.SSLObject | ssl.SSLSocket | None], None]


class _Connection(HTTPConnection):
    def __init__(self, peer: Peer, dialing: Dialing) -> None:
        host, port = dialing.dialer.resolve(peer.address)
        super().__init__(host, port, timeout=STALL_S)
        self._peer = peer.name
        self._dialing = dialing

    def connect(self) -> None:
        """Raises ``OSError`` and ``PeerError``; ``sock`` is there for ``abort`` all the time."""
        family, kind, protocol, _, address = socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM
        )[0]
        self.sock = socket.socket(family, kind, protocol)
        self.sock.settimeout(self.timeout)
        self.sock.connect(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        context = self._dialing.context
        if context is not None:
            self.sock = context.wrap_socket(self.sock, do_handshake_on_connect=False)
            self.sock.do_handshake()
            self._dialing.check(self._peer, self.sock)


class PeerSource:
    """Asks one peer; for one thread, except ``abort``.

    Every call raises ``InterruptedReadError`` if the peer is gone, stalls or breaks the protocol,
    ``PeerBusyError`` and ``PeerLacksError``.
    """

    def __init__(self, peer: Peer, digest: str, dialing: Dialing) -> None:
        self.peer = peer
        self._prefix = f"/bundles/{digest}"
        self._dialing = dialing
        self._connection = _Connection(peer, dialing)
        self._headers = {NAME_HEADER: dialing.name, "Accept-Encoding": "identity"}

    def inventory(self) -> Inventory:
        """What the peer has."""
        data = self._read("/bundles", MAX_INVENTORY_BYTES)
        try:
            return msgspec.json.decode(data, type=Inventory)
        except (msgspec.DecodeError, ValueError, RecursionError) as exc:
            raise InterruptedReadError(f"{self.peer.name} says nonsense: {exc}") from exc

    def marks(self, num_chunks: int) -> bytes:
        """[num_chunks] 1 for each chunk that the peer has, else 0."""
        data = self._read(f"{self._prefix}/arrived", min(num_chunks, MAX_CHUNKS))
        if len(data) != num_chunks or data.translate(None, b"\x00\x01"):
            raise InterruptedReadError(f"{self.peer.name} says nonsense of what has arrived")
        return data

    def read(self, name: str, limit: int) -> bytes:
        """A small file of the bundle."""
        return self._read(f"{self._prefix}/{name}", limit)

    def stream(self, name: str, start: int, stop: int) -> Pieces:
        """Bytes ``[start, stop)`` of a file in pieces, as they come."""
        response = self._get(f"{self._prefix}/{name}", f"bytes={start}-{stop - 1}")
        left = stop - start
        try:
            if response.status != 206 or response.length != left:
                raise InterruptedReadError(f"{self.peer.name} sent something else")
            while left:
                data = self._receive(response, min(READ_BYTES, left))
                left -= len(data)
                yield data
        finally:
            response.close()  # leaves the connection open
            if left:  # the rest is on its way: this connection is of no use any more
                self._connection.close()

    def abort(self) -> None:
        """From any thread: what is being read ends at once with ``InterruptedReadError``."""
        sock = self._connection.sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def _read(self, path: str, limit: int) -> bytes:
        response = self._get(path, None)
        if response.length is None or response.length > limit:
            self._connection.close()
            raise InterruptedReadError(f"{self.peer.name} sends more than {limit} bytes")
        pieces = []
        deadline = time.monotonic() + STALL_S + response.length / MIN_BYTES_PER_S
        while response.length:
            if time.monotonic() > deadline:
                self._connection.close()
                raise InterruptedReadError(f"{self.peer.name} is too slow")
            pieces.append(self._receive(response, READ_BYTES))
        response.close()
        return b"".join(pieces)

    def _get(self, path: str, span: str | None) -> HTTPResponse:
        headers = self._headers | ({"Range": span} if span else {})
        try:
            response = self._ask(path, headers)
        except MeshError as exc:  # its certificate is another's
            self._connection.close()
            raise InterruptedReadError(f"{self.peer.name}: {exc}") from exc
        except (HTTPException, OSError, UnicodeError) as exc:  # the last: a name that cannot be one
            self._connection.close()
            raise InterruptedReadError(f"{self.peer.name} cannot be reached: {exc}") from exc
        if response.status in (200, 206):
            return response
        retry_after = response.headers.get("Retry-After", "")
        self._connection.close()
        if response.status == 503:
            seconds = float(retry_after) if retry_after.isdecimal() else 1.0
            raise PeerBusyError(min(seconds, MAX_RETRY_AFTER_S))
        if response.status in (404, 416):
            raise PeerLacksError
        raise InterruptedReadError(f"{self.peer.name} says {response.status} {response.reason}")

    def _ask(self, path: str, headers: dict[str, str]) -> HTTPResponse:
        """On the open connection if there is one; the peer may have closed it since."""
        kept = self._connection.sock is not None
        try:
            self._connection.request("GET", path, headers=headers)
            return self._connection.getresponse()
        except (HTTPException, ConnectionError):
            self._connection.close()
            if not kept:
                raise
        self._connection.request("GET", path, headers=headers)
        return self._connection.getresponse()

    def _receive(self, response: HTTPResponse, limit: int) -> bytes:
        try:
            data = response.read1(limit)
        except (HTTPException, OSError, ValueError) as exc:
            self._connection.close()
            raise InterruptedReadError(f"{self.peer.name} stopped sending: {exc}") from exc
        if not data:
            self._connection.close()
            raise InterruptedReadError(f"{self.peer.name} stopped sending")
        return data
