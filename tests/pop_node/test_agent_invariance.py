"""From the topology to the engine: who asked for batch invariance or packed weights sees it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from pop_node.store.store import Store
from tests.pop_node.hand_router import WAIT_S
from tests.pop_node.node_mesh import RunningNode, lonely_node, write_store


@pytest.mark.parametrize("asked", [False, True])
async def test_the_engine_of_a_node_says_whether_it_is_batch_invariant(
    asked: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store: Store = write_store(tmp_path / "store")
    async with lonely_node(store, tmp_path) as (node, _):
        config = replace(node.config, node=replace(node.config.node, batch_invariant=asked))
        running = RunningNode(config)
        with caplog.at_level(logging.INFO):
            task = asyncio.create_task(running.run())
            try:
                async with asyncio.timeout(WAIT_S):
                    await running.open.wait()
            finally:
                running.agent.drain()
                async with asyncio.timeout(WAIT_S):
                    await task
    assert ("reference+batch_invariant backend" in caplog.text) == asked
    assert ("reference backend" in caplog.text) != asked


@pytest.mark.parametrize("weights", ["plain", "resident"])
async def test_the_engine_of_a_node_says_how_it_keeps_its_weights(
    weights: Literal["plain", "resident"], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store: Store = write_store(tmp_path / "store")
    async with lonely_node(store, tmp_path) as (node, _):
        asked = replace(node.config.node, backend="native", weights=weights)
        running = RunningNode(replace(node.config, node=asked))
        with caplog.at_level(logging.INFO):
            task = asyncio.create_task(running.run())
            try:
                async with asyncio.timeout(WAIT_S):
                    await running.open.wait()
            finally:
                running.agent.drain()
                async with asyncio.timeout(WAIT_S):
                    await task
    assert ("+resident backend" in caplog.text) == (weights == "resident")
