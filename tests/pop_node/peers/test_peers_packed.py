"""Packed bundles between nodes: what travels is what is stored."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from pop_node.peers.bring import Bringing
from pop_node.store import layout
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from registry.entries import ServiceEntry
from tests.pop_node.peers.peer_mesh import Neighbour, mesh_of, same
from tests.pop_node.store.adding import weights_of
from topology.model import Model


@pytest.fixture
def raw(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that has the model ``tiny`` in bfloat16, in chunks that packing shortens."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4 * layout.ALIGNMENT)
    store = Store(tmp_path / "raw")
    store.add(str(source), "tiny", "bfloat16", unwatched)
    return store


@pytest.fixture
def packed(tmp_path: Path, raw: Store) -> Store:
    """A store that has it packed."""
    store = Store(tmp_path / "packed")
    store.add(raw.get("tiny").path.as_uri(), "tiny", None, unwatched)
    store.pack("tiny", progress=unwatched)
    return store


async def test_a_node_takes_the_packed_bundle_of_the_pinned_model(
    tmp_path: Path, raw: Store, packed: Store
) -> None:
    pinned = Model("tiny", digest=raw.get("tiny").manifest.identity, dtype="bfloat16")
    topology, registry = mesh_of(["n1", "n2", "n3"], pinned), dict[str, ServiceEntry]()
    seen: list[Bringing] = []
    async with AsyncExitStack() as stack:
        for name in ("n1", "n2"):
            await stack.enter_async_context(Neighbour(name, packed.root, topology, registry))
        taker = Neighbour("n3", tmp_path / "here", topology, registry)
        await stack.enter_async_context(taker)
        manifest = await taker.bringer.bring("tiny", seen.append)
        assert manifest.bundle == packed.get("tiny").manifest.bundle
        same(taker.store, packed)
    nbytes = packed.get("tiny").manifest.data.nbytes
    assert sum(seen[-1].sources.values()) == nbytes < raw.get("tiny").manifest.data.nbytes
    expected = weights_of(raw)
    for name, tensor in weights_of(taker.store).items():
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16))


async def test_a_node_that_has_either_form_asks_for_nothing(raw: Store, packed: Store) -> None:
    identity = raw.get("tiny").manifest.identity
    topology = mesh_of(["n1"], Model("tiny", digest=identity, dtype="bfloat16"))
    for store in (raw, packed):
        async with Neighbour("n1", store.root, topology, {}) as node:
            assert (await node.bringer.bring("tiny")).identity == identity
