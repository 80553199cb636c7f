"""Gives this node's bundles to nodes that lack them, no faster than serving allows.

A small HTTP server (``pop_node.peers.inventory`` says what it answers). Data passes one token
bucket, whoever takes; only so many take at once, the others are told when to come back, and each
node gets a few connections only: a new site cannot stampede anybody. Reading is done on threads.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec
from aiohttp import web

from pop_node.peers.bucket import TokenBucket
from pop_node.peers.inventory import NAME_HEADER, Inventory
from pop_node.peers.meter import RateMeter
from pop_node.peers.stock import Item, Stock
from pop_node.store.files import read_at
from pop_node.store.holding import Hold
from pop_node.store.manifest import MAX_FILE_BYTES
from pop_node.store.store import Store
from wire.address import format_address
from wire.errors import ConfigError, PeerError

MAX_TAKES = 8
"""Ranges given at once, the rest are told to come back. Guess: enough to fill any port, and each
still gets an eighth; who is turned away finds parts with those who were not."""

TAKES_PER_NODE = 3
"""Ranges given at once to one node: it has two lines, and may have left a range whose end has not
been noticed here yet."""

BUSY_SHARE = 0.5
"""Guess: how much of its rate a node gives while it serves answers."""

RETRY_AFTER_S = 1
"""What those hear who are turned away: about the time of a range of 64 MiB at 400 Mbit/s."""

PIECE_BYTES = 64 * 1024
"""At most between two turns of the event loop: encrypting as much takes 0.1 ms, so no answer waits.
The allocator maps fresh memory for pieces from 128 KiB on, which costs more than reading them."""

SEND_BYTES = 256 * 1024
"""At most in one go. Measured at 500 Mbit/s: waking up for every 64 KiB took twice the processor
time in all, and each time it is an engine on the same core that is put aside."""

SEND_S = 0.1
"""At most in one go, in seconds of the rate, so that ``MAX_TAKES`` takers each see something arrive
long before they think that this node stalls."""

MIN_SEND_BYTES = 1024
"""At least in one go, however low the rate."""

BURST_S = 0.02
"""How much the bucket lets pass at once, in seconds of its rate; as coarse as timers are."""

STALL_S = 10.0
"""Guess: a taker that reads nothing for so long is gone."""

THREADS = 2
"""Readers of the disk; a page cache or NVMe outruns any network with them."""

MAX_CONNECTIONS = 256
"""Beyond it whoever asks is told to come back. Guess: 64 nodes of a mesh lack a model at the same
time, each over two connections, and twice that."""

_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})")

T = TypeVar("T")

Authorize = Callable[[str, ssl.SSLObject | None], None]
"""Raises ``PeerError`` unless the peer is the node that it says it is and may take."""


@dataclass(frozen=True, slots=True)
class GiverStatistics:
    """Since the start: ``given_bytes`` of data, ``turned_away`` requests; ``takes`` of ``takers``
    right now; the rate of the last seconds."""

    given_bytes: int
    turned_away: int
    takes: int
    takers: int
    bytes_per_s: float


class Giver:
    """The listener ``Node.bundles`` of a node; ``start`` and ``close`` in one event loop."""

    def __init__(
        self,
        store: Store,
        *,
        node: str,
        rate_bytes_per_s: float,
        is_busy: Callable[[], bool],
        authorize: Authorize,
        wanting: Callable[[], Iterable[str]] = tuple,
        bringing: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """``is_busy``: whether the node serves answers now. ``wanting``, ``bringing``: models, see
        ``Inventory``; a ``Bringer`` knows them."""
        self._stock = Stock(store)
        self._node = node
        self._rate_bytes_per_s = rate_bytes_per_s
        self._is_busy = is_busy
        self._authorize = authorize
        self._wanting = wanting
        self._bringing = bringing
        self._bucket = TokenBucket(BURST_S)
        self._takes: Counter[str] = Counter()
        self._given_bytes = 0
        self._meter = RateMeter()
        self._turned_away = 0
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="give")
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int, context: ssl.SSLContext | None) -> str:
        """Listen; returns ``host:port``. Raises ``ConfigError`` if the address is taken."""
        app = web.Application(client_max_size=1)
        app.router.add_get("/bundles", self._inventory)
        app.router.add_get("/bundles/{digest}/arrived", self._arrived)
        app.router.add_get("/bundles/{digest}/{file}", self._file)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.0
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=context)
        try:
            await site.start()
        except OSError as exc:
            await self._runner.cleanup()
            raise ConfigError(f"cannot listen on {format_address(host, port)}: {exc}") from exc
        return format_address(host, self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop; what is being given ends in the middle, and takers go elsewhere."""
        if self._runner is not None:
            await self._runner.cleanup()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def statistics(self) -> GiverStatistics:
        """Counters and gauges; in the event loop."""
        return GiverStatistics(
            given_bytes=self._given_bytes,
            turned_away=self._turned_away,
            takes=self._takes.total(),
            takers=len(self._takes),
            bytes_per_s=self._meter.rate(asyncio.get_running_loop().time()),
        )

    # ---- answers -------------------------------------------------------------------------------

    async def _inventory(self, request: web.Request) -> web.Response:
        self._known(request)
        try:
            bundles = await self._on_thread(self._stock.listing)
        except ConfigError as exc:  # the disk fails: it asks elsewhere
            raise web.HTTPInternalServerError(text="the store cannot be read") from exc
        wanting, bringing = sorted(self._wanting()), sorted(self._bringing())
        inventory = Inventory(self._node, bundles, wanting, bringing)
        return web.Response(body=msgspec.json.encode(inventory), content_type="application/json")

    async def _arrived(self, request: web.Request) -> web.Response:
        self._known(request)
        item = await self._find(request)
        marks = item.marks if item.marks is not None else b"\x01" * len(item.manifest.data.chunks)
        return web.Response(body=marks)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        taker = self._known(request)
        item = await self._find(request)
        name = request.match_info["file"]
        if name not in item.files():
            raise web.HTTPNotFound(text="no such file")
        if name == item.manifest.data.name:
            return await self._range(request, taker, item)
        path = item.path / name
        try:
            text = await self._on_thread(lambda: read_at(path, 0, MAX_FILE_BYTES))
        except OSError as exc:
            raise web.HTTPNotFound(text="not here any more") from exc
        return web.Response(body=text)

    async def _range(self, request: web.Request, taker: str, item: Item) -> web.StreamResponse:
        wanted = _RANGE.fullmatch(request.headers.get("Range", ""))
        if wanted is None:
            raise web.HTTPBadRequest(text="data is given in ranges")
        start, stop = int(wanted[1]), int(wanted[2]) + 1
        if not item.has(start, stop):
            raise web.HTTPRequestRangeNotSatisfiable(text="not all of that is here")
        with self._taking(taker), self._held(item) as fd:
            response = web.StreamResponse(status=206)
            total = item.manifest.data.nbytes
            response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
            response.content_length = stop - start
            await response.prepare(request)
            await self._send(request, response, fd, start, stop)
            return response

    async def _send(
        self,
        request: web.Request,
        response: web.StreamResponse,
        fd: int,
        start: int,
        stop: int,
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            while start < stop:
                rate = self._rate_bytes_per_s * (BUSY_SHARE if self._is_busy() else 1.0)
                nbytes = max(MIN_SEND_BYTES, min(SEND_BYTES, int(rate * SEND_S)))
                nbytes = min(nbytes, stop - start)
                wait_s = self._bucket.take(nbytes, loop.time(), rate)
                await asyncio.sleep(max(0.0, wait_s))
                end = start + nbytes
                while start < end:
                    piece = await self._read(fd, min(PIECE_BYTES, end - start), start)
                    async with asyncio.timeout(STALL_S):
                        await response.write(piece)
                    start += len(piece)
                    self._given_bytes += len(piece)
                    self._meter.add(len(piece), loop.time())
                    await asyncio.sleep(0)
        except (OSError, TimeoutError):  # the taker is gone or the disk fails: it asks elsewhere
            if request.transport is not None:
                request.transport.abort()

    async def _read(self, fd: int, nbytes: int, start: int) -> bytes | bytearray:
        """What is in the page cache is copied at once, everything else on a thread."""
        data = bytearray(nbytes)
        with suppress(OSError):  # not cached, or a file system that cannot say so
            if os.preadv(fd, [data], start, os.RWF_NOWAIT) == nbytes:
                return data
        read = await self._on_thread(partial(os.pread, fd, nbytes, start))
        if len(read) < nbytes:
            raise ConnectionError("the data file is cut short")
        return read

    # ---- who and how many ----------------------------------------------------------------------

    def _known(self, request: web.Request) -> str:
        """The asking node's name.

        Raises ``HTTPForbidden`` unless it is one of this mesh, ``HTTPServiceUnavailable`` if there
        are too many connections.
        """
        assert self._runner is not None
        assert self._runner.server is not None
        if len(self._runner.server.connections) > MAX_CONNECTIONS:
            raise self._come_back()
        name = request.headers.get(NAME_HEADER, "")
        try:
            self._authorize(name, request.get_extra_info("ssl_object"))
        except PeerError as exc:
            raise web.HTTPForbidden(text=exc.message) from exc
        return name

    @contextmanager
    def _taking(self, taker: str) -> Iterator[None]:
        """Be one of those who take; raises ``HTTPServiceUnavailable`` if there are enough."""
        if self._takes.total() >= MAX_TAKES or self._takes[taker] >= TAKES_PER_NODE:
            raise self._come_back()
        self._takes[taker] += 1
        try:
            yield
        finally:
            self._takes[taker] -= 1
            if not self._takes[taker]:
                del self._takes[taker]

    @contextmanager
    def _held(self, item: Item) -> Iterator[int]:
        """Its data file, open; the bundle is kept from being collected while it is given."""
        with ExitStack() as stack:
            try:
                stack.callback(Hold(item.path).close)
                fd = os.open(item.path / item.manifest.data.name, os.O_RDONLY | os.O_CLOEXEC)
            except (
                ConfigError,
                OSError,
            ) as exc:  # removed, moved since it was found, or unreadable
                raise web.HTTPNotFound(text="not here any more") from exc
            stack.callback(os.close, fd)
            yield fd

    def _come_back(self) -> web.HTTPServiceUnavailable:
        self._turned_away += 1
        return web.HTTPServiceUnavailable(
            headers={"Retry-After": str(RETRY_AFTER_S)}, text="enough others take"
        )

    async def _find(self, request: web.Request) -> Item:
        digest = request.match_info["digest"]
        item = await self._on_thread(lambda: self._stock.find(digest))
        if item is None:
            raise web.HTTPNotFound(text="no such bundle")
        return item

    async def _on_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)
