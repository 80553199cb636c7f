"""Peers that are too slow are left for the origin, which brings only what is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.peers import patience
from pop_node.peers.bring import Bringing
from pop_node.peers.patience import PATIENCE_S, SLOW_SHARE, Patience, least_bytes_per_s
from pop_node.store.store import Store
from tests.pop_node.peers.peer_mesh import Neighbour, entry_of, mesh_of, same
from tests.pop_node.peers.rogue import misbehaving
from tests.pop_node.store.origins import serving
from topology.model import Link, Model


@given(st.floats(0.1, 50.0), st.floats(0.0, 50.0))
def test_patience_ends_for_those_below_the_least_and_for_nobody_else(
    rate: float, least: float
) -> None:
    """``rate`` chunks per second come, one at a time."""
    made, now, left = Patience(10_000, 0.0), 0.0, 10_000
    over = False
    while now < 4 * PATIENCE_S and not over:
        now += 0.1
        left = 10_000 - int(now * rate)
        over = made.is_over(left, least, now)
    if rate < 0.9 * least:
        assert over
    elif rate > 1.1 * least + 0.1:
        assert not over


def test_patience_counts_from_the_last_progress() -> None:
    made = Patience(100, 0.0)
    assert not made.is_over(100, 0.0, PATIENCE_S)
    assert not made.is_over(99, 0.0, PATIENCE_S + 1)
    assert not made.is_over(99, 0.0, 2 * PATIENCE_S + 1)
    assert made.is_over(99, 0.0, 2 * PATIENCE_S + 1.1)


def test_the_least_is_a_share_of_what_peers_and_links_could_give(tiny: Model) -> None:
    mesh = mesh_of(["n1", "n2", "n3"], tiny, sites={"n2": "b", "n3": "b"})
    mesh = dataclasses.replace(mesh, links={frozenset("ab"): Link("a", "b", 10.0, 100.0)})
    nodes = mesh.nodes | {"n3": dataclasses.replace(mesh.nodes["n3"], give_mbps=40.0)}
    mesh = dataclasses.replace(mesh, nodes=nodes)
    least = least_bytes_per_s(mesh, mesh.nodes["n1"], ["n2", "n3"])
    assert least == pytest.approx((100 + 40) * 1e6 / 8 * SLOW_SHARE)
    assert least_bytes_per_s(mesh, mesh.nodes["n1"], []) == 0.0


@pytest.mark.parametrize("with_origin", [True, False])
async def test_a_crawling_peer_is_left_if_there_is_an_origin(
    tmp_path: Path,
    original: Store,
    tiny: Model,
    monkeypatch: pytest.MonkeyPatch,
    with_origin: bool,
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 1.0)
    path, nbytes = original.get("tiny").path, original.get("tiny").manifest.data.nbytes
    with serving(path) as site, misbehaving("n1", path) as peer:
        peer.pause_s = 0.05  # 40 kB/s over two lines: some seconds for all of it
        model = dataclasses.replace(tiny, source=site.url if with_origin else None)
        topology = mesh_of(["n1", "n2"], model)
        registry = {"n1": entry_of("n1", topology, peer.address)}
        seen: list[Bringing] = []
        async with Neighbour("n2", tmp_path / "here", topology, registry) as taker:
            await taker.bringer.bring("tiny", seen.append)
            same(taker.store, original)
    sources = seen[-1].sources
    assert sum(sources.values()) == nbytes
    assert sources["n1"] > 0
    assert sources.keys() == ({"n1", "origin"} if with_origin else {"n1"})
