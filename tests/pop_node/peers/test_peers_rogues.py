"""Peers that lie, stall, die, crawl or talk nonsense are left for another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from pop_node.peers import client
from pop_node.peers.bring import Bringing
from pop_node.store.manifest import bundle_digest, encode_manifest
from pop_node.store.store import Store
from registry.entries import ServiceEntry
from tests.pop_node.peers.peer_mesh import Neighbour, entry_of, mesh_of, same
from tests.pop_node.peers.rogue import Rogue, misbehaving
from topology.model import Model
from wire.errors import ConfigError


class World:
    """``n1`` misbehaves, ``n2`` gives, ``n3`` brings; all in one site, ``n1`` asked first."""

    def __init__(self, rogue: Rogue, taker: Neighbour, giver: Neighbour) -> None:
        self.rogue = rogue
        self.taker = taker
        self.giver = giver
        self.seen: list[Bringing] = []

    async def bring(self) -> dict[str, int]:
        """Bytes by peer."""
        await self.taker.bringer.bring("tiny", self.seen.append)
        return self.seen[-1].sources

    def without_giver(self) -> None:
        del self.taker.registry["n2"]


@pytest.fixture
def rogue(original: Store) -> Iterator[Rogue]:
    with misbehaving("n1", original.get("tiny").path) as rogue:
        yield rogue


@pytest.fixture
async def world(tmp_path: Path, original: Store, tiny: Model, rogue: Rogue) -> AsyncIterator[World]:
    topology = mesh_of(["n1", "n2", "n3"], tiny)
    registry: dict[str, ServiceEntry] = {"n1": entry_of("n1", topology, rogue.address)}
    giver = Neighbour("n2", original.root, topology, registry)
    taker = Neighbour("n3", tmp_path / "here", topology, registry)
    async with giver, taker:
        yield World(rogue, taker, giver)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


async def test_a_peer_that_lies_about_a_chunk_is_not_asked_again(
    world: World, original: Store
) -> None:
    weights = original.get("tiny").path / "weights.bin"
    nbytes = weights.stat().st_size
    data = weights.read_bytes()
    for at in range(100, nbytes, 4096):  # every chunk that it gives is wrong
        data = flipped(data, at)
    world.rogue.spoil["weights.bin"] = data
    assert await world.bring() == {"n2": nbytes}
    same(world.taker.store, original)
    asked = [request for request in world.rogue.requests if request.startswith("weights.bin")]
    assert 1 <= len(asked) <= 2, "at most both lines had asked before the first lie was seen"


async def test_a_lying_peer_alone_brings_nothing(world: World, original: Store) -> None:
    world.without_giver()
    world.rogue.spoil["weights.bin"] = flipped(
        (original.get("tiny").path / "weights.bin").read_bytes(), 5000
    )
    with pytest.raises(ConfigError, match="n1: what it sent is not what the manifest names"):
        await world.bring()
    assert world.taker.store.rows() == []
    world.rogue.spoil.clear()  # what was right stayed, and is not asked for again
    world.rogue.requests.clear()
    sources = await world.bring()
    assert sources["n1"] < original.get("tiny").manifest.data.nbytes
    same(world.taker.store, original)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "tokenizer.json"])
async def test_other_files_are_taken_from_whom_they_are_right(
    world: World, original: Store, name: str
) -> None:
    text = (original.get("tiny").path / name).read_bytes()
    world.rogue.spoil[name] = flipped(text, len(text) // 2)
    await world.bring()
    same(world.taker.store, original)


async def test_a_manifest_that_claims_the_pinned_identity_is_seen_through(
    world: World, original: Store
) -> None:
    """It signs itself, its chunks are its own; the tensors it names are not the pinned model's."""
    manifest = world.rogue.manifest
    tensors = [msgspec.structs.replace(manifest.tensors[0], blake3="1" * 64)]
    lie = msgspec.structs.replace(manifest, tensors=tensors + manifest.tensors[1:])
    lie = msgspec.structs.replace(lie, bundle=bundle_digest(lie))
    world.rogue.manifest = lie
    world.rogue.spoil["manifest.json"] = encode_manifest(lie)
    world.rogue.pause_s = 0.05
    await world.bring()
    same(world.taker.store, original)
    nbytes = original.get("tiny").manifest.data.nbytes
    assert world.rogue.taken_bytes < nbytes / 2, "it is found out before its data is here"


async def test_only_the_pinned_model_is_taken(world: World) -> None:
    world.without_giver()
    world.rogue.manifest = msgspec.structs.replace(world.rogue.manifest, identity="3" * 64)
    with pytest.raises(ConfigError, match="no node gives tiny"):
        await world.bring()
    assert {request.split()[0] for request in world.rogue.requests if request.strip()} == set()


async def test_a_peer_that_stalls_is_left(world: World, original: Store) -> None:
    world.rogue.stall_after = 2048
    sources = await world.bring()
    assert set(sources) == {"n2"}
    same(world.taker.store, original)


async def test_a_peer_that_stalls_alone_is_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "STALL_S", 0.3)
    world.without_giver()
    world.rogue.stall_after = 0
    with pytest.raises(ConfigError, match=r"n1: n1 (stopped sending|cannot be reached)"):
        await world.bring()


async def test_connections_that_break_are_taken_up_again(world: World, original: Store) -> None:
    world.without_giver()
    world.rogue.cut_after = 5 * 1024  # one chunk and a part of the next
    sources = await world.bring()
    assert sources == {"n1": original.get("tiny").manifest.data.nbytes}
    same(world.taker.store, original)


async def test_a_slow_peer_does_not_hold_up_the_end(world: World, original: Store) -> None:
    world.rogue.pause_s = 0.2  # a chunk takes 0.8 s, all of them minutes
    sources = await world.bring()
    assert sources["n2"] > 0.9 * original.get("tiny").manifest.data.nbytes
    same(world.taker.store, original)


@pytest.mark.parametrize("status", [500, 403, 404, 416])
async def test_refusals_of_all_kinds_lead_to_another_peer(
    world: World, original: Store, status: int
) -> None:
    world.rogue.status = status
    assert set(await world.bring()) == {"n2"}
    same(world.taker.store, original)


async def test_answers_of_another_length_are_refused(world: World, original: Store) -> None:
    world.rogue.extra = b"x"
    assert set(await world.bring()) == {"n2"}
    same(world.taker.store, original)


@pytest.mark.parametrize("marks", [b"", b"\x01", b"\x02" * 100, b"\x01" * 100_000])
async def test_nonsense_about_what_is_there_is_refused(
    world: World, original: Store, marks: bytes
) -> None:
    world.rogue.marks = marks
    assert set(await world.bring()) == {"n2"}
    same(world.taker.store, original)


@pytest.mark.parametrize("said", [b"{", b'{"more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"])
async def test_nonsense_about_what_it_has_is_refused(world: World, said: bytes) -> None:
    world.without_giver()
    world.rogue.spoil[""] = said
    with pytest.raises(ConfigError, match="no node gives tiny"):
        await world.bring()


async def test_a_peer_that_dies_in_the_middle_is_left(world: World, original: Store) -> None:
    world.rogue.pause_s = 0.01

    def die(bringing: Bringing) -> None:
        if bringing.sources.get("n1"):
            world.rogue.status = 500
            world.rogue.cut_after = 0

    await world.taker.bringer.bring("tiny", die)
    same(world.taker.store, original)


async def test_a_peer_that_drips_is_left(world: World, original: Store) -> None:
    """Something comes all the time, so it never counts as stalling."""
    world.rogue.drip_s = 0.05
    assert set(await world.bring()) == {"n2"}
    same(world.taker.store, original)


async def test_an_address_that_cannot_be_one_is_like_a_dead_peer(
    world: World, original: Store
) -> None:
    topology = world.taker.topology
    world.taker.registry["n1"] = entry_of("n1", topology, "a" * 100 + ".example:1")
    assert set(await world.bring()) == {"n2"}
    same(world.taker.store, original)
