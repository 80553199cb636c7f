"""Where a bundle may come from can be said: from peers alone, or from its origin alone."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from pop_node.peers.bring import Bringing
from pop_node.peers.bringer import Via
from pop_node.store.store import Store
from registry.entries import ServiceEntry
from tests.pop_node.peers.peer_mesh import Neighbour, mesh_of
from topology.model import Model
from wire.errors import ConfigError


@pytest.mark.parametrize(("via", "giver"), [("peer", "n1"), ("origin", "origin")])
async def test_it_comes_from_there(
    tmp_path: Path, original: Store, tiny: Model, source: Path, via: Via, giver: str
) -> None:
    topology = mesh_of(["n1", "n2"], replace(tiny, source=str(source)))
    registry: dict[str, ServiceEntry] = {}
    seen: list[Bringing] = []
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(Neighbour("n1", original.root, topology, registry))
        taker = Neighbour("n2", tmp_path / "here", topology, registry)
        await stack.enter_async_context(taker)
        await taker.bringer.bring("tiny", seen.append, via)
    assert {name for bringing in seen for name in bringing.sources} <= {giver}
    taker.store.verify("tiny")


async def test_peers_alone_means_that_the_origin_is_not_asked(
    tmp_path: Path, tiny: Model, source: Path
) -> None:
    topology = mesh_of(["n1", "n2"], replace(tiny, source=str(source)))
    async with Neighbour("n2", tmp_path / "here", topology, {}) as taker:
        with pytest.raises(ConfigError, match="no node gives tiny"):
            await taker.bringer.bring("tiny", via="peer")
    assert not taker.store.has("tiny")
