"""Tells routers how busy this node is and what it holds: once a second, and sooner on a change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from pop_node.hosting.model_host import ModelHost
from pop_node.router_link import RouterLink
from wire.messages import Load, NodeMessage

LOAD_PERIOD_S = 1.0
LOAD_MIN_GAP_S = 0.05
"""At most 20 pushes a second per router, however fast the load changes."""


class LoadPush:
    """Pushes ``Load`` and ``CacheDelta`` of ``hosts`` over ``links``, both as they are by then."""

    def __init__(
        self,
        hosts: Mapping[str, ModelHost],
        links: Collection[RouterLink],
        is_draining: Callable[[], bool],
    ) -> None:
        self._hosts = hosts
        self._links = links
        self._is_draining = is_draining
        self._wanted = asyncio.Event()

    def soon(self) -> None:
        """Something changed that routers should hear of."""
        self._wanted.set()

    def load(self) -> Load:
        """The load of this moment."""
        return Load(
            engines=[host.load() for host in self._hosts.values()],
            links=[rate for host in self._hosts.values() for rate in host.link_rates()],
            draining=self._is_draining(),
        )

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
            deltas = [host.facts.directory.take_delta() for host in self._hosts.values()]
            news: list[NodeMessage] = [self.load()]
            news += [delta for delta in deltas if delta is not None]
            for message in news:
                for link in self._links:
                    link.say(message)
