"""The prefill side's links of one endpoint: dialled when a transfer asks for them.

Thin: makes ``PeerLink`` objects, carries messages to them and remembers what they measured.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
from collections.abc import Callable

import msgspec

from pop_node.kv_stream.codec_threads import CodecThreads
from pop_node.kv_stream.connection import Connection
from pop_node.kv_stream.events import SenderEvent, SendPiece
from pop_node.kv_stream.frames import FromReceiver, Hello, ToReceiver
from pop_node.kv_stream.link import Authorize, PeerLink
from pop_node.kv_stream.staging import Staging
from pop_node.kv_stream.watched_tasks import Spawn
from wire.address import Dialer, is_loopback
from wire.errors import ConfigError, MeshError, PeerError
from wire.messages import LinkRate

log = logging.getLogger(__name__)


def link_key(peer: str, address: str) -> str:
    """The name of a link in the sender's events: a new node at an old address is another link."""
    return f"{peer} {address}"


class Links:
    """All links that were dialled and are not down."""

    def __init__(
        self,
        hello: Hello,
        staging: Staging,
        codec: CodecThreads,
        dialer: Dialer,
        client_ssl: ssl.SSLContext | None,
        authorize: Authorize,
        emit: Callable[[SenderEvent], None],
        is_open: Callable[[bytes], bool],
        number: Callable[[], int],
        watch: Callable[[], None],
        spawn: Spawn,
    ) -> None:
        self._hello = hello
        self._staging = staging
        self._codec = codec
        self._dialer = dialer
        self._client_ssl = client_ssl
        self._authorize = authorize
        self._emit = emit
        self._is_open = is_open
        self._number = number
        self._watch = watch
        self._spawn = spawn
        self._links: dict[str, PeerLink] = {}
        self._rates: dict[str, LinkRate] = {}  # of links that are gone, by peer
        self._link_numbers = itertools.count(1)
        self._dials: set[asyncio.Task[None]] = set()

    def connections(self) -> list[Connection[FromReceiver]]:
        """Connections of all links."""
        return [conn for link in self._links.values() for conn in link.connections]

    def rates(self) -> list[LinkRate]:
        """What was measured, one per peer."""
        rates = dict(self._rates)
        rates |= {link.peer: link.rate for link in self._links.values() if link.is_up}
        return list(rates.values())

    def connect(self, key: str, peer: str) -> None:
        """Dial unless the link exists; a new link answers with an event from its own task."""
        if key in self._links:
            return
        link = self._links[key] = PeerLink(
            key,
            peer,
            msgspec.structs.replace(self._hello, link=next(self._link_numbers)),
            self._staging,
            self._codec,
            self._emit,
            self._is_open,
            self._authorize,
            self._watch,
        )
        dial = self._spawn(self._dial, link, key.rpartition(" ")[2])
        self._dials.add(dial)
        dial.add_done_callback(self._dials.discard)

    def tell(self, key: str, message: ToReceiver) -> None:
        """Say something over a link, if it is still there."""
        if key in self._links:
            self._links[key].tell(message)

    def send_piece(self, piece: SendPiece) -> None:
        """Queue a staged piece on its link."""
        self._links[piece.address].send_piece(piece)

    def gone(self, key: str, why: MeshError) -> None:
        """A link is down: keep what it measured."""
        link = self._links.pop(key)
        if link.is_up:  # else nothing is known of it, and perhaps it does not exist
            self._rates[link.peer] = link.rate
        log.info("KV link to %s is down: %s", link.peer, why)

    def close(self, error: PeerError) -> None:
        """End every link."""
        for link in list(self._links.values()):
            link.close(error)

    def stop_dialling(self) -> None:
        """Give up the links that are being made."""
        for dial in self._dials:
            dial.cancel()

    async def _dial(self, link: PeerLink, address: str) -> None:
        try:
            host, port = self._dialer.resolve(address)
        except ConfigError as exc:
            link.close(PeerError(f"{link.peer} gave a bad address: {exc}"))
            return
        if self._client_ssl is None and not is_loopback(host):
            link.close(PeerError(f"no TLS for {link.peer} at {address}", retryable=False))
            return
        await link.dial(host, port, self._client_ssl, self._number)
