"""The event loop that routers and agents run on, and the tiny model of the real agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from pop_node.store.store import Store
from tests.pop_node.node_mesh import write_store
from tests.router.router_mesh import RouterMesh, make_topology, running_mesh


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the tiny Llama."""
    return write_store(tmp_path_factory.mktemp("tiny-store"))


@pytest.fixture
async def mesh(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RouterMesh]:
    """A real router over fake nodes: fra-1 prefills, lhr-1 decodes, iad-1 far away does both."""
    async with running_mesh(monkeypatch) as running:
        yield running


@pytest.fixture
async def one_pair(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RouterMesh]:
    """A real router that has one node for each half of a request, and no choice."""
    topology = make_topology({"fra-1": ("prefill",), "lhr-1": ("decode",)})
    async with running_mesh(monkeypatch, topology) as running:
        yield running
