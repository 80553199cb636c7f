"""A disk that is read-only gives and does not take; one without room says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from pop_node.store.source import unwatched
from pop_node.store.store import Store
from registry.entries import ServiceEntry
from tests.pop_node.disks import remount
from tests.pop_node.peers.peer_mesh import Neighbour, mesh_of, same
from topology.model import Model
from wire.errors import ConfigError


async def test_a_node_gives_from_a_disk_that_is_read_only(
    tmp_path: Path, disk: Path, source: Path, original: Store, tiny: Model
) -> None:
    Store(disk / "store").add(str(source), "tiny", "float32", unwatched)
    remount(disk, "ro")
    topology, registry = mesh_of(["n1", "n2"], tiny), dict[str, ServiceEntry]()
    async with (
        Neighbour("n1", disk / "store", topology, registry),
        Neighbour("n2", tmp_path / "here", topology, registry) as taker,
    ):
        await taker.bringer.bring("tiny")
        same(taker.store, original)


@pytest.mark.parametrize(
    ("options", "said"), [("ro", "Read-only file system"), ("size=40k", "No space left on device")]
)
async def test_a_disk_that_cannot_take_says_so_before_anything_travels(
    disk: Path, original: Store, tiny: Model, options: str, said: str
) -> None:
    topology, registry = mesh_of(["n1", "n2"], tiny), dict[str, ServiceEntry]()
    async with (
        Neighbour("n1", original.root, topology, registry) as one,
        Neighbour("n2", disk / "store", topology, registry) as taker,
    ):
        remount(disk, options)
        with pytest.raises(ConfigError, match=f"cannot be changed.*{said}"):
            await taker.bringer.bring("tiny")
        assert one.giver.statistics().given_bytes == 0
        remount(disk, "rw,size=256k")
        await taker.bringer.bring("tiny")
        same(taker.store, original)
