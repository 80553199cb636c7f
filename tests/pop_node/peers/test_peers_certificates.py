"""Who takes bundles from whom, where nodes have certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from pop_node.store.store import Store
from popmesh.authority import init_authority, issue
from registry.entries import ServiceEntry
from tests.pop_node.peers.peer_mesh import Neighbour, mesh_of, same
from topology.model import Model, Topology
from wire.errors import ConfigError
from wire.tls import Credentials, Identity


def credentials(authority: Path, topology: Topology, name: str, kind: str = "node") -> Credentials:
    site = topology.nodes[name].site
    identity = Identity(topology.mesh, kind, site, name)  # type: ignore[arg-type]
    return Credentials.load(issue(authority, identity))


async def test_with_certificates_only_the_nodes_of_the_topology_take_and_give(
    tmp_path: Path, original: Store, tiny: Model
) -> None:
    topology, registry = mesh_of(["n1", "n2", "n3"], tiny), dict[str, ServiceEntry]()
    authority = tmp_path / "authority"
    init_authority(authority)
    one, two, three = (credentials(authority, topology, name) for name in ("n1", "n2", "n3"))
    async with Neighbour("n1", original.root, topology, registry, credentials=one) as giving:
        async with Neighbour("n2", tmp_path / "n2", topology, registry, credentials=two) as taker:
            await taker.bringer.bring("tiny")
            same(taker.store, original)
        given = giving.giver.statistics().given_bytes
        # another node's certificate, and none
        async with Neighbour(
            "n2", tmp_path / "wrong", topology, registry, credentials=three
        ) as taker:
            with pytest.raises(ConfigError, match="no node gives"):
                await taker.bringer.bring("tiny")
        async with Neighbour("n2", tmp_path / "none", topology, registry) as taker:
            with pytest.raises(ConfigError, match="no node gives"):
                await taker.bringer.bring("tiny")
        assert giving.giver.statistics().given_bytes == given


async def test_a_giver_with_another_nodes_certificate_is_not_asked(
    tmp_path: Path, original: Store, tiny: Model
) -> None:
    topology, registry = mesh_of(["n1", "n2", "n3"], tiny), dict[str, ServiceEntry]()
    authority = tmp_path / "authority"
    init_authority(authority)
    two, three = (credentials(authority, topology, name) for name in ("n2", "n3"))
    async with (
        Neighbour("n1", original.root, topology, registry, credentials=three) as impostor,
        Neighbour("n2", tmp_path / "here", topology, registry, credentials=two) as taker,
    ):
        with pytest.raises(ConfigError, match="no node gives"):
            await taker.bringer.bring("tiny")
        assert impostor.giver.statistics().given_bytes == 0
