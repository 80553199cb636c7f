"""Router tests run on the event loop that the router runs on."""

from __future__ import annotations

import asyncio

import pytest
import uvloop


@pytest.fixture(scope="session")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    """uvloop, whose transports differ from asyncio's in what they promise."""
    return uvloop.EventLoopPolicy()
