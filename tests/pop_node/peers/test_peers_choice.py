"""Which peers are near, which bundle is taken from whom, and whose turn it is."""

from __future__ import annotations

import dataclasses

import msgspec

from pop_node.peers import choice
from pop_node.peers.choice import best_offer, origin_wait_s
from pop_node.peers.inventory import Inventory, Stocked
from pop_node.peers.neighbours import Peer, peers_of
from tests.pop_node.peers.peer_mesh import entry_of, mesh_of
from topology.model import Model

PINNED = Model("m", digest="1" * 64, dtype="bfloat16")
NAMES = ["n1", "n2", "n3", "n4"]
TOPOLOGY = mesh_of(NAMES, PINNED, sites={"n2": "b", "n3": "c"})
ME = TOPOLOGY.nodes["n1"]


def stocked(
    bundle: str = "b" * 64,
    *,
    identity: str = "1" * 64,
    dtype: str = "bfloat16",
    names: tuple[str, ...] = ("m",),
    arrived: int = 9,
) -> Stocked:
    return Stocked(bundle, identity, dtype, list(names), 9000, 9, arrived)


def peer(name: str, site: str = "a", typical_s: float = 0.1) -> Peer:
    return Peer(name, site, "127.0.0.1:1", typical_s)


def has(name: str, *bundles: Stocked) -> dict[str, Inventory]:
    return {name: Inventory(name, list(bundles), [], [])}


# ---- neighbours --------------------------------------------------------------------------------


def test_the_nearest_come_first_and_what_was_measured_counts() -> None:
    entries = [entry_of(name, TOPOLOGY, "127.0.0.1:7000") for name in reversed(NAMES)]
    order = [found.name for found in peers_of(entries, TOPOLOGY, ME, {})]
    assert order == ["n4", "n2", "n3"], "own site, own continent, Japan; never oneself"
    slow = {"n4": 1000.0}
    assert [found.name for found in peers_of(entries, TOPOLOGY, ME, slow)] == ["n2", "n3", "n4"]


def test_entries_that_do_not_fit_the_topology_are_left_out() -> None:
    good = entry_of("n2", TOPOLOGY, "127.0.0.1:7000")
    bad = [
        dataclasses.replace(good, meta={**good.meta, "name": "stranger"}),
        dataclasses.replace(good, meta={**good.meta, "mesh": "another"}),
        dataclasses.replace(good, meta={**good.meta, "bundles": "nonsense"}),
        dataclasses.replace(good, meta={**good.meta, "bundles": "a b\r\nX: y:7000"}),
        dataclasses.replace(good, meta={k: v for k, v in good.meta.items() if k != "bundles"}),
        dataclasses.replace(good, status="critical"),
    ]
    assert peers_of(bad, TOPOLOGY, ME, {}) == []
    assert [found.name for found in peers_of([*bad, good], TOPOLOGY, ME, {})] == ["n2"]


# ---- offers ------------------------------------------------------------------------------------


def test_a_pinned_model_is_known_by_its_identity_alone() -> None:
    found = has("n2", stocked(identity="2" * 64)) | has("n3", stocked("c" * 64, names=("other",)))
    offer = best_offer(PINNED, [peer("n2"), peer("n3")], found, (), ())
    assert offer is not None
    assert (offer.bundle, [p.name for p in offer.holders]) == ("c" * 64, ["n3"])


def test_of_two_bundles_that_as_many_have_the_smaller_travels() -> None:
    raw = stocked("a" * 64)
    packed = msgspec.structs.replace(stocked("c" * 64), nbytes=6000)
    found = has("n2", raw) | has("n3", packed)
    offer = best_offer(PINNED, [peer("n2"), peer("n3")], found, (), ())
    assert offer is not None
    assert offer.bundle == packed.bundle
    offer = best_offer(PINNED, [peer("n2"), peer("n3"), peer("n4")], found | has("n4", raw), (), ())
    assert offer is not None
    assert offer.bundle == raw.bundle, "more peers give it at once"


def test_another_model_is_known_by_what_most_call_so() -> None:
    model = dataclasses.replace(PINNED, digest=None)
    found = (
        has("n2", stocked("a" * 64))
        | has("n3", stocked("c" * 64, identity="2" * 64))
        | has("n4", stocked("c" * 64, identity="2" * 64))
    )
    peers = [peer(name) for name in NAMES[1:]]
    offer = best_offer(model, peers, found, (), ())
    assert offer is not None
    assert offer.bundle == "c" * 64
    assert best_offer(model, peers, has("n2", stocked(dtype="float32")), (), ()) is None


def test_what_was_begun_goes_on_and_what_was_refused_is_not_taken() -> None:
    found = has("n2", stocked("a" * 64), stocked("b" * 64)) | has("n3", stocked("b" * 64))
    peers = [peer("n2"), peer("n3")]

    def bundle(begun: str = "", refused: str = "") -> str:
        offer = best_offer(PINNED, peers, found, {begun}, {refused})
        return offer.bundle if offer else ""

    assert bundle() == "b" * 64
    assert bundle(begun="a" * 64) == "a" * 64
    assert bundle(refused="b" * 64) == "a" * 64


def test_the_nearest_complete_holder_is_asked_before_all_others() -> None:
    found = has("n2", stocked(arrived=3)) | has("n3", stocked()) | has("n4", stocked())
    offer = best_offer(PINNED, [peer("n2"), peer("n3"), peer("n4")], found, (), ())
    assert offer is not None
    assert [holder.name for holder in offer.holders] == ["n3", "n2", "n4"]


# ---- turns -------------------------------------------------------------------------------------


def wants(name: str, *, bringing: bool = False) -> dict[str, Inventory]:
    return {name: Inventory(name, [], ["m"], ["m"] if bringing else [])}


def wait_s(name: str, found: dict[str, Inventory], waited_s: float = 0.0) -> float:
    peers = [peer(n, TOPOLOGY.nodes[n].site) for n in NAMES if n != name]
    return origin_wait_s(PINNED, TOPOLOGY.nodes[name], peers, found, waited_s)


def test_a_node_that_wants_it_alone_goes_at_once() -> None:
    assert wait_s("n1", {}) == 0
    assert wait_s("n1", has("n4")) == 0
    assert wait_s("n1", wants("n2")) == 0, "that is another site"


def test_nodes_of_a_site_go_in_order_of_their_names() -> None:
    assert wait_s("n1", wants("n4")) == choice.TURN_S
    assert wait_s("n4", wants("n1")) == 2 * choice.TURN_S
    assert wait_s("n1", wants("n4"), 1.5 * choice.TURN_S) == 0
    assert wait_s("n4", wants("n1"), 1.5 * choice.TURN_S) > 0


def test_nobody_goes_while_one_of_the_site_is_there() -> None:
    for waited_s in (0.0, 1e6):
        assert wait_s("n1", wants("n4", bringing=True), waited_s) > 0
    assert wait_s("n1", wants("n2", bringing=True)) == 0


def test_nodes_that_should_have_it_are_waited_for_a_moment() -> None:
    def wait(waited_s: float) -> float:
        peers = [peer("n2", TOPOLOGY.nodes["n2"].site)]
        return origin_wait_s(PINNED, TOPOLOGY.nodes["n1"], peers, {}, waited_s, {"n3"})

    assert wait(0.0) == choice.START_S
    assert 0 < wait(0.9 * choice.START_S) < choice.START_S
    assert wait(choice.START_S) == 0, "they may never come"
