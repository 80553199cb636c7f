"""Engine processes that were started ahead, with real processes."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from pop_node.engine import messages as m
from pop_node.engine.client import EngineClient
from pop_node.engine.config import EngineConfig
from pop_node.engine.spawn import Standby
from pop_node.kv_stream.staging import Staging, StagingLayout
from tests.pop_node.engine.tiny_llama import write_tiny_llama

WAIT_S = 60.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    model = write_tiny_llama(tmp_path_factory.mktemp("standby") / "tiny")
    return EngineConfig(model, "float32", "reference", 1, 640)


async def test_a_load_takes_the_process_that_waits(config: EngineConfig) -> None:
    standby, staging = Standby(), Staging.create(StagingLayout(4096, 4, 4))
    await standby.fill()
    await standby.fill()  # one is enough
    pid = standby.pid
    assert pid is not None
    assert [child.pid for child in psutil.Process().children()] == [pid]
    ready: asyncio.Future[m.EngineMessage] = asyncio.get_running_loop().create_future()
    client = EngineClient(30.0)
    await client.start(config, staging, ready.set_result, lambda code: None, standby.take)
    assert client.pid == pid
    assert standby.pid is None
    async with asyncio.timeout(WAIT_S):
        said = await ready
    assert isinstance(said, m.Ready)
    assert said.pid == pid
    await client.stop(timeout_s=WAIT_S)
    staging.close()
    await standby.close()


async def test_one_that_died_waiting_is_replaced() -> None:
    standby = Standby()
    await standby.fill()
    first = standby.pid
    assert first is not None
    waiting = standby._waiting
    assert waiting is not None
    psutil.Process(first).kill()
    async with asyncio.timeout(WAIT_S):
        await waiting.gone.wait()
    process = await standby.take()
    try:
        assert process.pid != first
    finally:
        await process.end()
    await standby.close()
    await standby.fill()
    assert standby.pid is None
    assert not psutil.Process().children(recursive=True)
