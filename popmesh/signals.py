"""Runs a coroutine as a process's main work, ended in order by a signal."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


def run_until_signal(work: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
    """Run ``work()``; returns its result, None if a signal cancelled it.

    After SIGINT, SIGTERM or SIGHUP it ends in order. A second signal cancels the ending too.
    """

    async def main() -> T | None:
        task = asyncio.current_task()
        assert task is not None
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a closed terminal, but not nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            return await work()
        except asyncio.CancelledError:
            return None

    return uvloop.run(main())
