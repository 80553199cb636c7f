"""Tells routers how busy this node is and what it holds: once a second, and sooner on a change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable

from pop_node.router_link import RouterLink
from wire.messages import CacheDelta, Load, NodeMessage

LOAD_PERIOD_S = 1.0
LOAD_MIN_GAP_S = 0.05
"""At most 20 pushes a second per router, however fast the load changes."""


class LoadPush:
    """Pushes ``load`` and ``deltas`` over ``links``, all as they are by then."""

    def __init__(
        self,
        load: Callable[[], Load],
        deltas: Callable[[], Iterable[CacheDelta]],
        links: Collection[RouterLink],
    ) -> None:
        self._load = load
        self._deltas = deltas
        self._links = links
        self._wanted = asyncio.Event()

    def soon(self) -> None:
        """Something changed that routers should hear of."""
        self._wanted.set()

    async def run(self) -> None:
        """Push until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            next_push = loop.time() + LOAD_PERIOD_S
            await asyncio.sleep(LOAD_MIN_GAP_S)
            try:
                async with asyncio.timeout_at(next_push):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()
            if not self._links:
                continue
            news: list[NodeMessage] = [self._load(), *self._deltas()]
            for message in news:
                for link in self._links:
                    link.say(message)
