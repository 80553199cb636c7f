"""A few nodes with stores on loopback that give and bring for real; only engines are missing.

``Neighbour`` stands for a node: its store, ``Giver`` and ``Bringer``. The registry is a dictionary.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable
from pathlib import Path

from pop_node.authorization import Authorization
from pop_node.peers.bringer import Bringer
from pop_node.peers.client import Dialing
from pop_node.peers.giver import Giver
from pop_node.store.store import Store
from registry.entries import ServiceEntry
from topology.model import Address, Model, Node, Position, Site, Topology
from wire.address import Dialer
from wire.tls import Credentials

FAST = 1e9


def mesh_of(names: list[str], model: Model, *, sites: dict[str, str] | None = None) -> Topology:
    """Nodes of one mesh; all at site ``a`` unless ``sites`` says where (``a``, ``b`` or ``c``)."""
    where = sites or {}
    return Topology(
        mesh="test",
        models={model.name: model},
        sites={
            "a": Site("a", Position(50.0, 8.0), "eu"),
            "b": Site("b", Position(48.0, 2.0), "eu"),
            "c": Site("c", Position(35.0, 139.0), "ap"),
        },
        nodes={
            name: Node(
                name=name,
                site=where.get(name, "a"),
                roles=frozenset({"prefill", "decode"}),
                models=(model.name,),
                mesh=Address("127.0.0.1", 0),
                kv=Address("127.0.0.1", 0),
            )
            for name in names
        },
        routers={},
    )


class Neighbour:
    """One node. ``registry`` is shared by all and found by their bringers."""

    def __init__(
        self,
        name: str,
        root: Path,
        topology: Topology,
        registry: dict[str, ServiceEntry],
        *,
        credentials: Credentials | None = None,
        rate_bytes_per_s: float = FAST,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.name = name
        self.store = Store(root)
        self.topology = topology
        self.registry = registry
        self.credentials = credentials
        check = Authorization(topology, credentials).check_node
        context = credentials.client_context() if credentials else None

        async def entries() -> list[ServiceEntry]:
            return list(registry.values())

        self.bringer = Bringer(
            self.store,
            topology.nodes[name],
            topology,
            entries,
            Dialing(name, Dialer(), context, check),
            random.Random(name),
        )
        self.giver = Giver(
            self.store,
            node=name,
            rate_bytes_per_s=rate_bytes_per_s,
            is_busy=is_busy,
            authorize=check,
            wanting=self.bringer.wanted,
            bringing=self.bringer.from_origin,
        )
        self.address = ""

    async def __aenter__(self) -> Neighbour:
        context: ssl.SSLContext | None = None
        if self.credentials is not None:
            context = self.credentials.server_context()
        self.address = await self.giver.start("127.0.0.1", 0, context)
        self.registry[self.name] = entry_of(self.name, self.topology, self.address)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.registry.pop(self.name, None)
        await self.giver.close()
        self.bringer.close()


def entry_of(name: str, topology: Topology, address: str) -> ServiceEntry:
    """What the registry says of a node that gives bundles at ``address``."""
    node = topology.nodes[name]
    meta = {"mesh": topology.mesh, "name": name, "site": node.site, "bundles": address}
    return ServiceEntry(f"test:{name}", "popmesh-node", "127.0.0.1", 1, meta, "passing")


def same(store: Store, original: Store) -> None:
    """The store has the original's bundle ``tiny`` and nothing besides."""
    store.verify("tiny")
    there, here = original.get("tiny").path, store.get("tiny").path
    assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
    for path in there.iterdir():
        if path.name != "manifest.json":
            assert (here / path.name).read_bytes() == path.read_bytes()
    assert not list((store.root / "partial").iterdir())
    assert not list((store.root / "tmp").iterdir())
