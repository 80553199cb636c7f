"""The link from this router to one node: connect, greet, demultiplex, measure, reconnect.

One long-lived connection; the supervisor ``NodeLink.run`` opens it again after every loss. Streams
register a listener under their number and get their tokens by a plain call from the read loop: one
frame is read per engine step, and each stream's listener writes once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from contextlib import suppress
from typing import assert_never

from router.links.link_words import LinkEvents, LinkIdentity, StreamListener
from router.links.node_connection import NodeConnection
from router.links.questions import (
    ANSWER_TIMEOUT_S,
    Answer,
    Questions,
    reports,
    version_of,
)
from topology.model import Node
from wire.address import is_loopback
from wire.errors import ConfigError, MeshError, PeerError
from wire.framing import negotiate
from wire.messages import (
    MAX_VERSION,
    MIN_VERSION,
    Accepted,
    Attach,
    Attached,
    CacheDelta,
    Cancel,
    Detached,
    Draining,
    Drill,
    DrillReport,
    DrillStarted,
    Failed,
    Finished,
    Goodbye,
    Hello,
    Load,
    Loading,
    NodeMessage,
    Offers,
    Part,
    Ping,
    Pong,
    Refused,
    Retarget,
    Step,
    Submit,
    Warm,
)
from wire.tls import peer_identity

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
"""TCP, TLS and greeting together; three round trips of the longest path on Earth fit ten times."""

PING_INTERVAL_S = 1.0
"""One small frame a second per link keeps the RTT fresh. Guess."""

PINGS_PER_DETECTION = 4
"""Pings in one detection time at least, so that one lost packet is no death. Guess."""

PATIENCE_RTTS = 20
"""Silence is given this many round trips, where that is longer than the detection time (DESIGN:
waits)."""

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 5.0
"""Pause before connecting again: doubles from the first to the second, halved by jitter at most."""


class NodeLink:
    """One node's link over all its reconnections."""

    def __init__(
        self,
        node: Node,
        address: str,
        identity: LinkIdentity,
        events: LinkEvents,
        rng: random.Random,
        detection_s: float,
    ) -> None:
        """``detection_s`` of silence end a connection, or 20 round trips if that is longer."""
        self.node = node
        self.address = address
        self.last_error: str | None = None
        self.reconnects = 0
        self.unknown_stream_messages = 0
        self._identity = identity
        self._events = events
        self._rng = rng
        self._detection_s = detection_s
        self._streams: dict[int, StreamListener] = {}
        self._connection: NodeConnection | None = None
        self._hurry = asyncio.Event()
        self._questions = Questions()

    @property
    def up(self) -> bool:
        """Greeted and usable."""
        return self._connection is not None

    @property
    def version(self) -> int:
        """Version of the mesh wire that both sides speak; 0 without a connection."""
        return 0 if self._connection is None else self._connection.version

    @property
    def incarnation(self) -> str:
        """Which start of the node this is; empty without a connection."""
        return "" if self._connection is None else self._connection.greeted.result().incarnation

    @property
    def rtt_ms(self) -> float | None:
        """Smoothed round trip, if measured on the present connection."""
        return None if self._connection is None else self._connection.rtt_ms

    @property
    def num_streams(self) -> int:
        """Streams open on this link."""
        return len(self._streams)

    def open(self, stream: int, listener: StreamListener) -> None:
        """Hear about ``stream`` from now on."""
        self._streams[stream] = listener

    def close_stream(self, stream: int) -> None:
        """Hear no more about ``stream``."""
        self._streams.pop(stream, None)

    def send(self, message: Submit | Cancel) -> bool:
        """Write now, or in parts as room comes; False when there is no link.

        What version 1 of the wire does not know goes through ``retarget``, ``warm`` and ``ask``,
        which look at the version that was agreed on.
        """
        if self._connection is None:
            return False
        self._connection.send(message)
        return True

    def retarget(self, message: Retarget) -> bool:
        """Give a prefill leg another decode node; False when there is no link, or an old one."""
        if self._connection is None or self._connection.version < 2:
            return False
        self._connection.send(message)
        return True

    def warm(self, message: Warm) -> bool:
        """Have a model in memory there; False when there is no link, or one that knows no such
        word."""
        if self._connection is None or self._connection.version < 3:
            return False
        self._connection.send(message)
        return True

    def reborn(self) -> None:
        """The node has started anew: give up a connection to its older start, connect at once."""
        if self._connection is not None:
            self._connection.give_up(PeerError("the node has started anew", code="link_lost"))
        self._hurry.set()

    async def ask(
        self, number: int, question: Attach | Drill, within_s: float = ANSWER_TIMEOUT_S
    ) -> Answer:
        """The node's answer to a question with a number never used before.

        A drill that reports is answered by its report, or by why it did not begin. Raises
        ``PeerError`` when the node cannot be asked or says nothing within ``within_s``.
        """
        if self._connection is None:
            raise PeerError(f"there is no link to {self.node.name}", code="link_lost")
        needs, version = version_of(question), self._connection.version
        if version < needs:
            raise PeerError(
                f"{self.node.name} speaks version {version} of the mesh wire, "
                f"{type(question).__name__} needs {needs}",
                code="version_mismatch",
                retryable=False,
            )
        answer = self._questions.open(number, reports=reports(question))
        try:
            self._connection.send(question)
            async with asyncio.timeout(within_s):
                return await answer
        except TimeoutError as exc:
            raise PeerError(f"{self.node.name} did not answer within {within_s:g} s") from exc
        finally:
            self._questions.close(number)

    async def run(self) -> None:
        """Keep the link open until cancelled."""
        backoff_s = BACKOFF_MIN_S
        while True:
            try:
                connection = await self._connect()
            except MeshError as exc:
                self._note(exc)
            else:
                backoff_s = BACKOFF_MIN_S
                await self._serve(connection)
            self.reconnects += 1
            self._hurry.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff_s * self._rng.uniform(0.5, 1.0)):
                    await self._hurry.wait()
            backoff_s = min(BACKOFF_MAX_S, 2 * backoff_s)

    async def _connect(self) -> NodeConnection:
        """A greeted connection; raises ``MeshError``."""
        host, port = self._identity.dialer.resolve(self.address)
        context: ssl.SSLContext | None = None
        if self._identity.credentials is not None:
            context = self._identity.credentials.client_context()
        elif not is_loopback(host):
            raise ConfigError(
                f"{self.node.name} is at {host}, off loopback, and this router has no certificate",
                suggestion="start it with --tls DIR",
            )
        loop = asyncio.get_running_loop()
        connection: NodeConnection | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: NodeConnection(
                        self._identity.hello(),
                        self._dispatch,
                        lambda rtt_ms: self._events.rtt(self.node.name, rtt_ms),
                    ),
                    host,
                    port,
                    ssl=context,
                )
                hello = await connection.greeted
                self._check(connection, hello)
        except (OSError, TimeoutError, PeerError) as exc:
            if connection is not None:
                connection.abort()
            if isinstance(exc, PeerError):
                raise
            reason = str(exc) or type(exc).__name__
            raise PeerError(f"cannot reach {self.address}: {reason}", code="link_lost") from exc
        except asyncio.CancelledError:
            if connection is not None:
                connection.abort()
            raise
        return connection

    def _check(self, connection: NodeConnection, hello: Hello) -> None:
        """The peer is the node we meant; raises ``PeerError`` after telling it why not."""
        try:
            theirs = (hello.min_version, hello.max_version)
            connection.version = negotiate(MIN_VERSION, MAX_VERSION, *theirs)
            claims = (hello.mesh, hello.kind, hello.name, hello.site)
            expected = (self._identity.mesh, "node", self.node.name, self.node.site)
            if claims != expected:
                raise _wrong_peer(f"expected {expected}, it says it is {claims}")
            if self._identity.credentials is not None:
                proven = peer_identity(connection.ssl_object())
                if (proven.mesh, proven.kind, proven.name, proven.site) != expected:
                    raise _wrong_peer(f"expected {expected}, its certificate says {proven.uri()}")
                if not proven.roles >= frozenset(hello.roles):
                    raise _wrong_peer(f"its certificate does not allow the roles {hello.roles}")
        except PeerError as exc:
            connection.say_goodbye(exc)
            raise

    async def _serve(self, connection: NodeConnection) -> None:
        """Carry messages until the connection dies, then tell everybody."""
        hello = connection.greeted.result()
        self._connection, self.last_error = connection, None
        log.info("link to %s is up (incarnation %s)", self.node.name, hello.incarnation)
        self._events.up(self.node.name, hello)
        error: MeshError = PeerError("the link was closed", code="link_lost")
        try:
            connection.deliver_early()
            error = await self._watch(connection)
            self._note(error)
        finally:
            self._connection = None
            connection.abort()
            self._events.down(self.node.name, error)
            unanswered = f"{self.node.name} did not answer: {error.message}"
            self._questions.lost(PeerError(unanswered, code=error.code))
            streams, self._streams = self._streams, {}
            for listener in streams.values():
                listener.link_lost(self.node.name)

    async def _watch(self, connection: NodeConnection) -> MeshError:
        """Ping, at least once a second; returns why the connection ended."""
        loop = asyncio.get_running_loop()
        interval_s = min(PING_INTERVAL_S, self._detection_s / PINGS_PER_DETECTION)
        while True:
            connection.ping()
            rtt_s = (connection.rtt_ms or 0.0) / 1e3
            patience_s = max(self._detection_s, PATIENCE_RTTS * rtt_s)
            pause_s = min(interval_s, connection.heard_at + patience_s - loop.time())
            asleep_at = loop.time()
            done, _ = await asyncio.wait((connection.closed,), timeout=max(0.0, pause_s))
            if done:
                return connection.closed.result()
            overslept_s = loop.time() - asleep_at - max(0.0, pause_s)
            if overslept_s > interval_s:
                # This process stood still (stopped, or its host slept): what nodes said meanwhile
                # lies unread, and silence while nobody listened is not theirs.
                connection.heard_at += overslept_s
            elif loop.time() - connection.heard_at >= patience_s:
                return PeerError(
                    f"nothing heard from {self.node.name} for {patience_s:.3g} s", code="link_lost"
                )

    def _note(self, error: MeshError) -> None:
        if self.last_error != error.message:
            log.warning("link to %s: %s", self.node.name, error.message)
        self.last_error = error.message

    def _dispatch(self, message: NodeMessage) -> None:
        """The hot path: one call per message, one loop over a step's entries."""
        match message:
            case Step(entries):
                streams, name = self._streams, self.node.name
                for entry in entries:
                    listener = streams.get(entry.stream)
                    if listener is not None:
                        listener.tokens(name, entry)
                    else:
                        self.unknown_stream_messages += 1
            case Accepted() | Loading() | Refused() | Finished() | Failed() | Detached():
                listener = self._streams.get(message.stream)
                if listener is not None:
                    listener.said(self.node.name, message)
                else:
                    if isinstance(message, Refused) and self._questions.answered(
                        message.stream, message
                    ):
                        return
                    self.unknown_stream_messages += 1
                    if isinstance(message, (Accepted, Loading)):
                        # A Cancel may overtake a long Submit still going out in parts.
                        self.send(Cancel(message.stream))
            case Attached(stream):
                self._questions.answered(stream, message)
            case DrillStarted(number) | DrillReport(number):
                self._questions.answered(number, message)
            case Load():
                self._events.load(self.node.name, message)
            case Offers(models):
                self._events.offers(self.node.name, models)
            case CacheDelta():
                self._events.cache(self.node.name, message)
            case Draining():
                self._events.draining(self.node.name)
            case Hello() | Goodbye() | Ping() | Pong() | Part():
                raise PeerError(f"unexpected {type(message).__name__}", code="protocol_error")
            case _:
                assert_never(message)


def _wrong_peer(text: str) -> PeerError:
    return PeerError(text, code="identity_mismatch", retryable=False)
