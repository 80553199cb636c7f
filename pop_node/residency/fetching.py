"""Brings models to the disk, and lets engines begin with what has arrived. A thin shell.

Each fetch is a task; what takes long in it runs on threads. What becomes of a model is told as
events of ``residency``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from pop_node.hosting.host_maker import HostMaker, Opened
from pop_node.peers.bring import Bringing
from pop_node.peers.bringer import Via
from pop_node.residency import events as ev
from pop_node.residency.supply import Supply
from wire.errors import ConfigError, MeshError

log = logging.getLogger(__name__)

EARLY_S = 30.0
"""An engine begins to load so long before the rest of its model should be here. Guess: longer than
most loads take, and an engine that waits for chunks holds memory for nothing."""

LOOK_S = 0.5
"""How often the disk is looked at for a bundle that an engine could begin with."""

Install = Callable[[str, Opened, bool], Awaitable[None]]
"""Have a host for a model whose bundle is there, or (True) still arriving."""


class Fetching:
    """All fetches of a node."""

    def __init__(
        self,
        supply: Supply,
        maker: HostMaker,
        tasks: asyncio.TaskGroup,
        feed: Callable[[ev.Event], None],
        install: Install,
        is_asked_for: Callable[[str], bool],
    ) -> None:
        self._supply = supply
        self._maker = maker
        self._tasks = tasks
        self._feed = feed
        self._install = install
        self._is_asked_for = is_asked_for
        self._running: set[asyncio.Task[None]] = set()
        self._look_at: dict[str, float] = {}

    def begin(self, model: str) -> None:
        """Fetch a model; ``Fetched`` or ``FetchFailed`` follows."""
        self._run(self._fetch(model))

    async def again(self, model: str, via: Via) -> tuple[float, int]:
        """Fetch a model that a drill took down and put away; seconds and bytes that it took.

        Raises ``ConfigError`` when it cannot be had.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._supply.bring(model, via=via)
        opened = await asyncio.to_thread(self._maker.open, model)
        took_s = loop.time() - began
        await self._install(model, opened, False)
        return took_s, opened.bundle.manifest.total_bytes

    async def close(self) -> None:
        """End all fetches; what has arrived stays."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _run(self, work: Awaitable[None]) -> None:
        async def running() -> None:
            await work

        task = self._tasks.create_task(running())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _fetch(self, model: str) -> None:
        log.info("%s is being fetched", model)
        self._look_at[model] = 0.0
        try:
            if not await self._bring(model):
                log.info("%s is fetched when it is asked for: it does not fit disk_gb", model)
                self._feed(ev.PutOff(model))
                return
            opened = await asyncio.to_thread(self._maker.open, model)
        except MeshError as exc:
            log.error("%s cannot be fetched: %s", model, exc)
            self._feed(ev.FetchFailed(model, str(exc)))
            return
        finally:
            del self._look_at[model]
        for name in await self._supply.make_room(opened.bundle.path):
            self._feed(ev.Gone(name))
        log.info("%s is on the disk, %.2f GB", model, opened.load_bytes / 1e9)
        await self._install(model, opened, False)

    async def _bring(self, model: str) -> bool:
        """False when the disk has no room for it, and nobody asks for it."""
        free = await self._supply.free_bytes()

        def progress(bringing: Bringing) -> None:
            beyond = free is not None and bringing.total_bytes > free
            if beyond and bringing.phase == "fetch" and not self._is_asked_for(model):
                work.cancel()
            self._progress(model, bringing)

        work = asyncio.ensure_future(self._supply.bring(model, progress))
        try:
            await asyncio.wait({work})
        finally:
            work.cancel()
            await asyncio.wait({work})
        if work.cancelled():
            return False
        work.result()
        return True

    def _progress(self, model: str, bringing: Bringing) -> None:
        if model not in self._look_at:
            return  # it is over, and this was on its way
        at_it = bringing.phase in ("fetch", "download")
        total = bringing.total_bytes if at_it else 0
        done = bringing.done_bytes if at_it else 0
        rate = bringing.rate_bytes_per_s if at_it else 0.0
        self._feed(ev.Progress(model, done, total, rate))
        now, eta_s = asyncio.get_running_loop().time(), bringing.eta_s
        soon = bringing.phase == "fetch" and eta_s is not None and eta_s <= EARLY_S
        if soon and now >= self._look_at[model]:
            self._look_at[model] = now + LOOK_S
            self._run(self._look(model))

    async def _look(self, model: str) -> None:
        """See whether an engine can begin with what is here by now."""
        try:
            bundle = await asyncio.to_thread(self._supply.arriving, model)
            if bundle is None:
                return
            opened = await asyncio.to_thread(self._maker.open_bundle, model, bundle)
        except ConfigError as exc:  # the fetch itself says so when it matters
            log.info("what has arrived of %s cannot be used yet: %s", model, exc)
            return
        if model in self._look_at:
            self._look_at[model] = float("inf")  # once is enough
            await self._install(model, opened, True)
