"""A model whose files are damaged, on a node that has others."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pop_node import lifecycle
from pop_node.store.store import Store
from tests.pop_node.hand_router import MODEL, HandRouter
from tests.pop_node.node_mesh import lonely_node, tiny_mesh, topology, write_store
from topology.budget import ENGINE_BYTES, GB
from topology.model import Model, Topology
from wire.errors import ConfigError
from wire.messages import EngineLoad, Finished

OTHER = "other"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two models of the same weights in bundles of their own."""
    store = write_store(tmp_path)
    settings = {"eos_token": "</s>", "chat_template": "{{ messages }}"}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    store.add(str(tmp_path / "source"), OTHER, "float32", lambda phase, done, total: None)
    return store


def damage(store: Store, model: str, name: str, text: bytes = b"{}") -> bytes:
    path = store.get(model).path / name
    before = path.read_bytes()
    path.write_bytes(text)
    return before


def spoil_weights(store: Store) -> None:
    """Of ``OTHER``: damaged tensors are found while they are loaded."""
    weights = bytearray((store.get(OTHER).path / "weights.bin").read_bytes())
    weights[len(weights) // 2] ^= 1
    damage(store, OTHER, "weights.bin", bytes(weights))


def two_models(memory_gb: float | None, source: str | None = None) -> Topology:
    """``source``: where ``OTHER`` is from."""
    plan = topology("a")
    models = {
        OTHER: Model(OTHER, source=source, dtype="float32"),
        MODEL: Model(MODEL, dtype="float32"),
    }
    node = replace(plan.nodes["a"], models=(OTHER, MODEL), memory_gb=memory_gb)
    return replace(plan, models=models, nodes={"a": node})


def engine(router: HandRouter, model: str) -> EngineLoad:
    assert router.load is not None
    return next(each for each in router.load.engines if each.model == model)


@pytest.mark.parametrize("memory_gb", [None, 2.2 * ENGINE_BYTES / GB])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json"])
async def test_the_node_serves_its_other_models_and_says_what_is_wrong(
    store: Store, tmp_path: Path, memory_gb: float | None, name: str
) -> None:
    damage(store, OTHER, name)
    async with tiny_mesh(store, tmp_path, "a", plan=two_models(memory_gb), version=3) as mesh:
        a = mesh.routers["a"]
        assert a.hello is not None
        assert [offer.name for offer in a.hello.models] == [MODEL]
        stream = mesh.whole("a")
        assert isinstance(await a.ending(stream), Finished)
        await a.until(lambda: engine(a, OTHER).warm_refused)
        said = engine(a, OTHER).warm_refused
        assert f"{name}: does not match its digest" in said
        assert "popmesh model add" in said
        assert engine(a, OTHER).warmth == "absent"


async def test_a_node_without_another_model_does_not_start(store: Store, tmp_path: Path) -> None:
    damage(store, MODEL, "tokenizer.json")
    async with lonely_node(store, tmp_path) as (node, _):
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=r"tokenizer\.json.*add it")):
            await node.run()


async def test_a_model_that_was_mended_is_served(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pop_node.residency.fetch_queue.RETRY_FIRST_S", 0.01)
    path = store.get(OTHER).path / "tokenizer.json"
    before = damage(store, OTHER, "tokenizer.json")
    async with tiny_mesh(store, tmp_path, "a", plan=two_models(None), version=3) as mesh:
        a = mesh.routers["a"]
        await a.until(lambda: engine(a, MODEL).warmth == "warm")
        path.write_bytes(before)
        await a.until(lambda: engine(a, OTHER).warmth == "warm")
        stream = mesh.whole("a", model=OTHER)
        assert isinstance(await a.ending(stream), Finished)


@pytest.mark.parametrize("memory_gb", [None, 2.2 * ENGINE_BYTES / GB])
async def test_the_node_says_why_an_engine_does_not_come_up(
    store: Store, tmp_path: Path, memory_gb: float | None
) -> None:
    spoil_weights(store)
    async with tiny_mesh(store, tmp_path, "a", plan=two_models(memory_gb), version=3) as mesh:
        a = mesh.routers["a"]
        stream = mesh.whole("a")
        assert isinstance(await a.ending(stream), Finished)
        await a.until(lambda: engine(a, OTHER).warm_refused)
        said = engine(a, OTHER).warm_refused
        assert "does not come up" in said
        assert "chunk 0" in said
        assert "popmesh model add" in said
        assert not engine(a, OTHER).ready


async def test_a_model_whose_damaged_bundle_was_removed_is_fetched_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "MAX_AWAITED_FAILURES", 1)
    spoil_weights(store)
    plan = two_models(None, str(tmp_path / "source"))

    def removed() -> bool:
        with suppress(ConfigError):  # an engine looks at it just now
            store.remove(OTHER)
        return not store.has(OTHER)

    async with tiny_mesh(store, tmp_path, "a", plan=plan, version=3) as mesh:
        a = mesh.routers["a"]
        await a.until(lambda: "chunk 0" in engine(a, OTHER).warm_refused)
        await a.until(removed)
        await a.until(lambda: engine(a, OTHER).warmth == "warm")
        stream = mesh.whole("a", model=OTHER)
        assert isinstance(await a.ending(stream), Finished)
