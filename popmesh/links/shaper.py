"""The shaper: TCP connections through emulated links.

Owns listeners, connections and the live plan. The kernel accepts a connection at once, so the
handshake's round trip is added afterwards: the target is dialled one way later, and nothing the
client sends is read before one round trip. Ends travel in order behind the data: half-close as
half-close, reset as reset, a refused dial as a reset.

A handshake needs both directions: while one is down a new connection hangs, and a client that gives
up was never heard of. What is sent on an open connection waits for its direction alone; that the
other direction would soon stop too, for want of acknowledgements, is not modelled.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import cast

from popmesh.links.pipe import Direction, End, Endpoint, pipe_pair, reset
from popmesh.links.plan import LinkPlan, ShapedPort
from wire.address import parse_address
from wire.errors import ConfigError

log = logging.getLogger("popmesh.links")

MAX_CONNECTIONS = 4096
"""Open connections of one shaper. Guess: 60 routers times 64 nodes; more is a leak somewhere."""


class Shaper:
    """Serves a plan until cancelled; ``reconfigure`` changes the links while it runs.

    ``rng`` decides which packets are lost.
    """

    def __init__(self, plan: LinkPlan, rng: random.Random) -> None:
        self._plan = plan
        self._directions = {way: Direction(plan.figures(*way), rng) for way in plan.directions()}
        self._open: set[Accepted] = set()
        self._tasks: asyncio.TaskGroup | None = None

    async def serve(self, ready: asyncio.Event) -> None:
        """Listen on every port of the plan; raises ``ConfigError`` when one cannot be bound."""
        servers: list[asyncio.Server] = []
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for port in self._plan.ports:
                    server = await self._listen(port)
                    servers.append(server)
                log.info("listening on %d ports for %d links", len(servers), len(self._plan.links))
                ready.set()
                await asyncio.get_running_loop().create_future()  # until cancelled
        finally:
            for server in servers:
                server.close()
            for accepted in list(self._open):
                accepted.drop()

    def reconfigure(self, plan: LinkPlan) -> None:
        """Apply new figures, faults and cuts at once; raises ``ConfigError`` on other changes."""
        before = self._plan.by_pair()
        if plan.ports != self._plan.ports or plan.by_pair().keys() != before.keys():
            raise ConfigError(
                "only figures, faults and cuts can change while the shaper runs",
                suggestion="restart it to change ports or pairs of sites",
            )
        for way in plan.directions():
            self._directions[way].configure(plan.figures(*way))
        self._plan = plan
        for link in plan.links:
            if link.cuts > before[link.pair].cuts:
                self._cut(link.pair)

    def _cut(self, pair: frozenset[str]) -> None:
        victims = [a for a in self._open if {a.port.from_site, a.port.to_site} == pair]
        for accepted in victims:
            accepted.cut()
        log.info("reset %d connections between %s", len(victims), " and ".join(sorted(pair)))

    def directions(self, port: ShapedPort) -> tuple[Direction, Direction]:
        """The link there and the link back."""
        there = (port.from_site, port.to_site)
        return self._directions[there], self._directions[there[::-1]]

    def admit(self, accepted: Accepted) -> bool:
        """Take in a connection, unless there are too many."""
        if len(self._open) >= MAX_CONNECTIONS:
            log.warning("refusing a connection: %d are open", len(self._open))
            return False
        self._open.add(accepted)
        assert self._tasks is not None
        accepted.dialling = self._tasks.create_task(self._dial(accepted))
        return True

    def release(self, accepted: Accepted) -> None:
        """Forget a connection whose sockets are both gone."""
        self._open.discard(accepted)

    async def _listen(self, port: ShapedPort) -> asyncio.Server:
        host, number = parse_address(port.listen)
        loop = asyncio.get_running_loop()
        try:
            return await loop.create_server(lambda: Accepted(self, port), host, number)
        except OSError as exc:
            raise ConfigError(
                f"cannot listen on {port.listen} for {port.target}: {exc.strerror}"
            ) from exc

    async def _dial(self, accepted: Accepted) -> None:
        there, back = accepted.outgoing.direction, accepted.incoming.direction
        while True:
            await there.up.wait()
            await back.up.wait()
            await asyncio.sleep(there.handshake_s())
            if there.up.is_set() and back.up.is_set():
                break
        host, number = parse_address(accepted.port.target)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: Dialled(accepted), host, number
            )
        except OSError as exc:
            log.info("%s refuses: %s", accepted.port.target, exc.strerror)
            accepted.incoming.finish(End.RESET)


class Accepted(Endpoint):
    """The client's socket."""

    def __init__(self, shaper: Shaper, port: ShapedPort) -> None:
        super().__init__(*pipe_pair(*shaper.directions(port)))
        self.port = port
        self.dialling: asyncio.Task[None] | None = None
        self._shaper = shaper
        self._sockets = 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        client = cast(asyncio.Transport, transport)
        if not self._shaper.admit(self):
            reset(client)
            return
        client.pause_reading()
        round_trip_s = self.outgoing.direction.line.delay_s + self.incoming.direction.line.delay_s
        asyncio.get_running_loop().call_later(round_trip_s, self._start_reading)

    def eof_received(self) -> bool:
        if self._hangs():
            return False  # it closes: whoever gives up a handshake was never heard of
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.dialling is not None:
            self.dialling.cancel()
        self.socket_lost()
        super().connection_lost(exc)

    def socket_made(self) -> None:
        """The target's socket is there too."""
        self._sockets += 1

    def socket_lost(self) -> None:
        """One of the two sockets is gone."""
        self._sockets -= 1
        if self._sockets == 0:
            self._shaper.release(self)

    def cut(self) -> None:
        """Reset both sockets."""
        for transport in (self.outgoing.source, self.outgoing.sink):
            if transport is not None and not transport.is_closing():
                reset(transport)

    def drop(self) -> None:
        """Close both sockets at once."""
        for transport in (self.outgoing.source, self.outgoing.sink):
            if transport is not None:
                transport.abort()

    def _hangs(self) -> bool:
        up = self.outgoing.direction.up.is_set() and self.incoming.direction.up.is_set()
        return not up and self.outgoing.sink is None

    def _start_reading(self) -> None:
        client = self.outgoing.source
        if client is not None and not client.is_closing():
            client.resume_reading()


class Dialled(Endpoint):
    """The target's socket."""

    def __init__(self, accepted: Accepted) -> None:
        super().__init__(accepted.incoming, accepted.outgoing)
        self._accepted = accepted

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._accepted.socket_made()
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._accepted.socket_lost()
        super().connection_lost(exc)
