"""When nodes go to a model's origin, and which of them."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import msgspec
import pytest

from pop_node.peers import choice, client, patience
from pop_node.peers.bring import Bringing
from pop_node.peers.inventory import Inventory
from pop_node.store.store import Store
from registry.entries import ServiceEntry
from tests.pop_node.peers.peer_mesh import Neighbour, entry_of, mesh_of, same
from tests.pop_node.peers.rogue import misbehaving
from tests.pop_node.store.origins import serving
from topology.model import Model


async def test_the_origin_is_asked_last_and_only_by_one_of_a_site(
    tmp_path: Path, original: Store, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "STALL_S", 20.0)  # three nodes share this process
    with serving(original.get("tiny").path) as site:
        model = dataclasses.replace(tiny, source=site.url)
        names = ["n1", "n2", "n3"]
        topology, registry = mesh_of(names, model), dict[str, ServiceEntry]()
        last: dict[str, Bringing] = {}
        async with AsyncExitStack() as stack:
            takers = [
                await stack.enter_async_context(
                    Neighbour(name, tmp_path / name, topology, registry)
                )
                for name in names
            ]
            async with asyncio.TaskGroup() as group:
                for taker in takers:
                    note = partial(last.__setitem__, taker.name)
                    group.create_task(taker.bringer.bring("tiny", note))
            for taker in takers:
                same(taker.store, original)
        assert [name for name, _ in site.requests].count("manifest.json") == 1
        origins = [name for name, bringing in last.items() if "origin" in bringing.sources]
        assert len(origins) == 1
        assert last[origins[0]].sources == {"origin": original.get("tiny").manifest.data.nbytes}


async def test_of_two_that_go_at_the_same_moment_one_turns_back(
    tmp_path: Path, original: Store, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them went after the last answer that the other had of it."""
    monkeypatch.setattr(choice, "TURN_S", 0.1)
    path = original.get("tiny").path
    with serving(path) as site, misbehaving("n1", path) as peer:
        model = dataclasses.replace(tiny, source=site.url)
        topology = mesh_of(["n1", "n2"], model)
        registry = {"n1": entry_of("n1", topology, peer.address)}
        taker = Neighbour("n2", tmp_path / "here", topology, registry)
        whole, said = peer.inventory, list[str]()

        def inventory() -> bytes:
            """It wants the model, goes once the other goes, has it once the other goes no more."""
            going = bool(taker.bringer.from_origin())
            if said and not going:
                return whole()
            said.extend(["goes"] * going)
            return msgspec.json.encode(Inventory("n1", [], ["tiny"], ["tiny"] if said else []))

        peer.inventory = inventory  # type: ignore[method-assign]
        seen: list[Bringing] = []
        async with taker:
            await taker.bringer.bring("tiny", seen.append)
            same(taker.store, original)
        assert set(seen[-1].sources) == {"n1"}
        assert site.requests == []


async def test_what_peers_brought_before_they_died_is_not_fetched_from_the_origin(
    tmp_path: Path, original: Store, tiny: Model
) -> None:
    with (
        serving(original.get("tiny").path) as site,
        misbehaving("n1", original.get("tiny").path) as peer,
    ):
        model = dataclasses.replace(tiny, source=site.url)
        topology = mesh_of(["n1", "n2"], model)
        registry = {"n1": entry_of("n1", topology, peer.address)}
        peer.pause_s = 0.001
        seen: list[Bringing] = []

        def note(bringing: Bringing) -> None:
            seen.append(bringing)
            if bringing.sources.get("n1"):
                peer.status = 500
                peer.cut_after = 0

        async with Neighbour("n2", tmp_path / "here", topology, registry) as taker:
            await taker.bringer.bring("tiny", note)
            same(taker.store, original)
        sources = seen[-1].sources
        assert sources["n1"] > 0
        assert sum(sources.values()) == original.get("tiny").manifest.data.nbytes
        assert ("weights.bin", "") not in site.requests


async def test_a_source_that_is_no_bundle_is_converted_when_no_peer_has_it(
    tmp_path: Path, original: Store, source: Path, tiny: Model
) -> None:
    model = dataclasses.replace(tiny, source=str(source))
    async with Neighbour("n1", tmp_path / "here", mesh_of(["n1"], model), {}) as node:
        await node.bringer.bring("tiny")
        same(node.store, original)


async def test_peers_that_are_always_busy_are_not_waited_for_for_ever(
    tmp_path: Path, original: Store, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    path = original.get("tiny").path
    with serving(path) as site, misbehaving("n1", path) as peer:
        peer.status = 503
        model = dataclasses.replace(tiny, source=site.url)
        topology = mesh_of(["n1", "n2"], model)
        registry = {"n1": entry_of("n1", topology, peer.address)}
        seen: list[Bringing] = []
        async with Neighbour("n2", tmp_path / "here", topology, registry) as taker:
            await taker.bringer.bring("tiny", seen.append)
            same(taker.store, original)
        assert set(seen[-1].sources) == {"origin"}
