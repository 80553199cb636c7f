"""From the topology to the engine: who asked for batch invariance or packed weights sees it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from pop_node.store.machine import this_machine
from pop_node.store.store import Store
from pop_node.store.weight_choice import ShapeTimings, Timing
from pop_node.store.weight_tables import WeightTable
from tests.pop_node.hand_router import WAIT_S
from tests.pop_node.node_mesh import MODEL, RunningNode, lonely_node, write_store


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
    assert await is_resident(write_store(tmp_path / "store"), weights, tmp_path, caplog) == (
        weights == "resident"
    )


@pytest.mark.parametrize("faster", [False, True])
async def test_a_node_that_may_choose_follows_what_was_measured(
    faster: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store: Store = write_store(tmp_path / "store")
    timing = Timing(1, plain_us=2.0, resident_us=1.0 if faster else 3.0)
    timed = (ShapeTimings((64, 64), 3, (timing,)),)
    store.keep_table(MODEL, WeightTable(this_machine(1), timed))
    assert await is_resident(store, "auto", tmp_path, caplog) == faster


async def is_resident(
    store: Store,
    weights: Literal["plain", "resident", "auto"],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> bool:
    """What the engine of a node says that is asked for ``weights``."""
    async with lonely_node(store, tmp_path) as (node, _):
        asked = replace(node.config.node, backend="native", weights=weights, threads=1)
        topology = node.config.topology
        models = {MODEL: replace(topology.models[MODEL], dtype="bfloat16")}
        config = replace(node.config, node=asked, topology=replace(topology, models=models))
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
    return "+resident backend" in caplog.text
