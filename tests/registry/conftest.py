"""Fixtures: one Consul agent for the whole session, an embedded registry per test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import count

import pytest
from registry_servers import ConsulAgent, Restartable, RestartableConsul, RestartableEmbedded

from registry.client import Registry
from registry.embedded import EmbeddedRegistry
from registry.entries import Registration

BOTH = ["embedded", pytest.param("consul", marks=pytest.mark.consul)]
_numbers = count(1)


@pytest.fixture(scope="session")
def consul_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulAgent]:
    agent = ConsulAgent(tmp_path_factory.mktemp("consul"))
    agent.start()
    yield agent
    agent.kill()


@pytest.fixture
async def embedded_url() -> AsyncIterator[str]:
    server = EmbeddedRegistry()
    yield await server.start()
    await server.stop()


@pytest.fixture(params=BOTH)
def registry_url(request: pytest.FixtureRequest) -> str:
    """Each test that asks for it runs against both servers."""
    if request.param == "embedded":
        url: str = request.getfixturevalue("embedded_url")
        return url
    agent: ConsulAgent = request.getfixturevalue("consul_agent")
    return agent.url


@pytest.fixture
async def registry(registry_url: str) -> AsyncIterator[Registry]:
    async with Registry.connect(registry_url) as client:
        yield client


@pytest.fixture(params=BOTH)
async def restartable(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Restartable]:
    """A running server of the test's own that it may kill and start again."""
    server: Restartable
    if request.param == "embedded":
        server = RestartableEmbedded()
    else:
        server = RestartableConsul(tmp_path_factory.mktemp("consul"))
    await server.start()
    yield server
    await server.kill()


@pytest.fixture
def service() -> str:
    """A service name (or key prefix) that no other test uses: they share one Consul."""
    return f"service-{next(_numbers)}"


@pytest.fixture
def registration(service: str) -> Registration:
    return Registration(
        service_id=f"{service}:a",
        service=service,
        address="192.0.2.1",
        port=7000,
        meta={"name": "a", "draining": "no"},
        ttl_s=30.0,
        deregister_after_s=60.0,
    )
