"""Bundles from peers over real sockets on loopback."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from pop_node.peers.bring import Bringing
from pop_node.store.store import Store
from registry.entries import ServiceEntry
from tests.pop_node.peers.peer_mesh import Neighbour, mesh_of, same
from topology.model import Model
from wire.errors import ConfigError


async def test_a_bundle_comes_from_the_peer_that_has_it(
    tmp_path: Path, original: Store, tiny: Model
) -> None:
    topology = mesh_of(["n1", "n2"], tiny)
    registry: dict[str, ServiceEntry] = {}
    seen: list[Bringing] = []
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(Neighbour("n1", original.root, topology, registry))
        taker = Neighbour("n2", tmp_path / "here", topology, registry)
        await stack.enter_async_context(taker)
        manifest = await taker.bringer.bring("tiny", seen.append)
        assert manifest.identity == tiny.digest
        same(taker.store, original)
        assert await taker.bringer.bring("tiny") == manifest
    assert seen[-1].phase == "done"
    assert seen[-1].sources == {"n1": manifest.data.nbytes}
    assert taker.store.row("tiny").entry.source == "mesh:test"


async def test_without_peers_and_source_the_reason_is_said(tmp_path: Path, tiny: Model) -> None:
    topology = mesh_of(["n1"], tiny)
    async with Neighbour("n1", tmp_path / "here", topology, {}) as node:
        with pytest.raises(ConfigError, match=r"no node gives tiny.*names no source"):
            await node.bringer.bring("tiny")
