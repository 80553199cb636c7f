"""The tasks of one endpoint, none of which may end by an exception unseen.

They dial and pack, and their ends are events of the machines: what one of them raises that nobody
expected leaves machines that wait for a word which will not come. So it ends the endpoint. This
tells its owner once; what else is under way goes on until ``stop``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import ParamSpec, Protocol

log = logging.getLogger(__name__)

P = ParamSpec("P")


class Spawn(Protocol):
    """Begins a task that is waited for and watched."""

    def __call__(
        self, work: Callable[P, Coroutine[None, None, None]], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[None]: ...


class WatchedTasks:
    """Use from one event loop only. ``on_broken`` is called on it."""

    def __init__(self, name: str, on_broken: Callable[[], None]) -> None:
        self._name = name
        self._on_broken = on_broken
        self.is_broken = False
        self._stop = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Tasks may begin from now on."""
        started = asyncio.Event()
        self._runner = asyncio.create_task(self._run(started), name=self._name)
        await started.wait()

    async def stop(self) -> None:
        """Wait for the end of all tasks; whoever began them has told them to end."""
        self._stop.set()
        if self._runner is not None:
            await self._runner

    def spawn(
        self, work: Callable[P, Coroutine[None, None, None]], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[None]:
        """Begin ``work(*args)``; called between ``start`` and ``stop``."""
        return self._tasks.create_task(self._watched(work, *args, **kwargs))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """What the block raises is the end of the endpoint, and not of who runs it."""
        try:
            yield
        except Exception:  # supervisor: whoever owns the endpoint makes another
            log.exception("the KV stream of %s broke", self._name)
            if not self.is_broken:
                self.is_broken = True
                self._on_broken()

    async def _watched(
        self, work: Callable[P, Coroutine[None, None, None]], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        with self.watch():
            await work(*args, **kwargs)

    async def _run(self, started: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            started.set()
            await self._stop.wait()
