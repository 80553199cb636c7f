"""Runs a coroutine as a process's main work, ended in order by a signal."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


def run_until_signal(work: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
    """Run ``work()``; SIGINT and SIGTERM cancel it, and it ends in order. None if it was cancelled.

    A second signal cancels the ending too.
    """

    async def main() -> T | None:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            return await work()
        except asyncio.CancelledError:
            return None

    return uvloop.run(main())
