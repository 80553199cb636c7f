"""The shaper: TCP connections through emulated links.

Owns listeners, connections and the live plan. The kernel accepts a connection at once, so the
handshake's round trip is added afterwards: the target is dialled one way later, and nothing the
client sends is read before one round trip. Ends travel in order behind the data: half-close as
half-close, reset as reset, a refused dial as a reset.
"""

from __future__ import annotations

import asyncio
import logging
from typing import cast

from popmesh.links.pipe import Direction, End, Endpoint, pipe_pair, reset
from popmesh.links.plan import LinkPlan, ShapedPort
from wire.address import parse_address
from wire.errors import ConfigError

log = logging.getLogger("popmesh.links")

MAX_CONNECTIONS = 4096
"""Open connections of one shaper. Guess: 60 routers times 64 nodes; more is a leak somewhere."""


class Shaper:
    """Serves a plan until cancelled; ``reconfigure`` changes the links' figures while it runs."""

    def __init__(self, plan: LinkPlan) -> None:
        self._plan = plan
        self._directions: dict[tuple[str, str], Direction] = {}
        for link in plan.links:
            for pair in ((link.a, link.b), (link.b, link.a)):
                self._directions[pair] = Direction(link)
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
        """Apply new figures to bytes sent from now on; raises ``ConfigError`` on other changes."""
        if plan.ports != self._plan.ports or plan.by_pair().keys() != self._plan.by_pair().keys():
            raise ConfigError(
                "only rtt_ms and bandwidth_mbps can change while the shaper runs",
                suggestion="restart it to change ports or pairs of sites",
            )
        for link in plan.links:
            for pair in ((link.a, link.b), (link.b, link.a)):
                self._directions[pair].line.configure(link.rate_bytes_per_s, link.one_way_s)
        self._plan = plan

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
        self._tasks.create_task(self._dial(accepted))
        return True

    def release(self, accepted: Accepted) -> None:
        """Forget a connection whose client side is gone."""
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
        await asyncio.sleep(accepted.outgoing.direction.line.delay_s)
        host, number = parse_address(accepted.port.target)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: Endpoint(accepted.incoming, accepted.outgoing), host, number
            )
        except OSError as exc:
            log.info("%s refuses: %s", accepted.port.target, exc.strerror)
            accepted.incoming.finish(End.RESET)


class Accepted(Endpoint):
    """The client's socket."""

    def __init__(self, shaper: Shaper, port: ShapedPort) -> None:
        super().__init__(*pipe_pair(*shaper.directions(port)))
        self.port = port
        self._shaper = shaper

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        client = cast(asyncio.Transport, transport)
        if not self._shaper.admit(self):
            reset(client)
            return
        client.pause_reading()
        round_trip_s = 2 * self.outgoing.direction.line.delay_s
        asyncio.get_running_loop().call_later(round_trip_s, self._start_reading)

    def connection_lost(self, exc: Exception | None) -> None:
        self._shaper.release(self)
        super().connection_lost(exc)

    def drop(self) -> None:
        """Close both sockets at once."""
        for transport in (self.outgoing.source, self.outgoing.sink):
            if transport is not None:
                transport.abort()

    def _start_reading(self) -> None:
        client = self.outgoing.source
        if client is not None and not client.is_closing():
            client.resume_reading()
