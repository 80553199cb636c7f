"""Runs one router process: uvloop, signals, exit."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import uvloop

from router.app import RouterConfig, serve


def run(config: RouterConfig, ready: Callable[[str], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, finishing running requests; raises ``ConfigError``."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_signalled(config, ready))


async def _until_signalled(config: RouterConfig, ready: Callable[[str], None] | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(config, ready, stop)
