"""Router tests run on the event loop that the router runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import uvloop


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop, whose transports promise less than asyncio's."""
    return {"uvloop": uvloop.new_event_loop}
