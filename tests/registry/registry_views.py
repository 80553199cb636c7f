"""What a watcher published, for tests that wait for a view."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from registry.entries import Snapshot

PATIENCE_S = 30.0
"""Bound of every wait of these tests."""


class Views:
    """Every view that a watcher published, and a way to wait for one."""

    def __init__(self) -> None:
        self.all: list[Snapshot] = []
        self._news = asyncio.Event()

    def add(self, snapshot: Snapshot) -> None:
        self.all.append(snapshot)
        self._news.set()

    async def wait_for(self, wanted: Callable[[Snapshot], bool]) -> Snapshot:
        """The last view, as soon as it is a wanted one."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.all or not wanted(self.all[-1]):
                self._news.clear()
                await self._news.wait()
        return self.all[-1]


def with_status(**wanted: str) -> Callable[[Snapshot], bool]:
    """A view of exactly these instances (by the last part of their id) with these statuses."""
    return lambda view: {e.service_id[-1]: e.status for e in view.entries} == wanted
