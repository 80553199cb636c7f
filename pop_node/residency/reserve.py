"""When a node has an engine process wait for the next load, and what it has ready. A thin shell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pop_node.engine.config import Ahead
from pop_node.engine.spawn import Standby

FILL_AFTER_S = 2.0
"""From a model's first token to the start of the next engine process. Guess: its imports do not
slow down the answers that waited for the model."""


class Reserve:
    """Fills ``standby``, where there is one, with what ``ahead`` says then; used in the node's
    event loop."""

    def __init__(
        self, standby: Standby | None, tasks: asyncio.TaskGroup, ahead: Callable[[], Ahead]
    ) -> None:
        self._standby = standby
        self._tasks = tasks
        self._ahead = ahead
        self._timer: asyncio.TimerHandle | None = None

    def fill_soon(self) -> None:
        """Have a process wait, ``FILL_AFTER_S`` from now on."""
        if self._standby is not None and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(FILL_AFTER_S, self._fill, self._standby)

    def _fill(self, standby: Standby) -> None:
        self._timer = None
        self._tasks.create_task(standby.fill(self._ahead()))

    async def empty(self) -> None:
        """The next engine starts from nothing."""
        self._cancel()
        if self._standby is not None:
            await self._standby.empty()

    async def close(self) -> None:
        """No process waits any more, and none will."""
        self._cancel()
        if self._standby is not None:
            await self._standby.close()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
