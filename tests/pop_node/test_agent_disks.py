"""A node whose disk cannot take its model says why, and goes on by itself once it can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.pop_node.disks import remount
from tests.pop_node.hand_router import HandRouter
from tests.pop_node.node_mesh import tiny_mesh, topology, write_store
from topology.budget import ENGINE_BYTES, GB
from wire.messages import EngineLoad, Finished


def engine(router: HandRouter) -> EngineLoad:
    assert router.load is not None
    (load,) = router.load.engines
    return load


@pytest.mark.parametrize(
    ("options", "said"), [("ro", "Read-only file system"), ("size=40k", "No space left on device")]
)
async def test_a_node_fetches_its_model_once_its_disk_takes_it(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, options: str, said: str
) -> None:
    monkeypatch.setattr("pop_node.residency.fetch_queue.RETRY_FIRST_S", 0.05)
    full = write_store(tmp_path / "full")
    plan = topology("a", "b")
    memory_gb = 1.2 * ENGINE_BYTES / GB  # with a budget a node serves before its models are here
    taker = replace(plan.nodes["b"], store=disk / "store", memory_gb=memory_gb)
    plan = replace(plan, nodes={**plan.nodes, "b": taker})
    remount(disk, options)
    async with tiny_mesh(full, tmp_path, "a", "b", plan=plan, version=3) as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        await b.until(lambda: said in engine(b).warm_refused)
        assert engine(b).warmth in ("absent", "fetching")
        remount(disk, "rw,size=8m")
        await b.until(lambda: engine(b).warmth == "warm")
        streams = {name: mesh.whole(name) for name in ("a", "b")}
        assert isinstance(await a.ending(streams["a"]), Finished)
        assert isinstance(await b.ending(streams["b"]), Finished)
        assert mesh.answer(streams["a"]) == mesh.answer(streams["b"])
