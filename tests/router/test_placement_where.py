"""Placement: on which nodes a model is kept, and that it stays there."""

from __future__ import annotations

from typing import Any

import pytest

from router.placement.leases import LEASE_S, RESAY
from router.placement.machine import LOOK_S, MISSING_S, YIELD_S
from tests.router.placement_driver import GB, TOPOLOGY, A, B, Driver, topology_of, view_of
from tests.router.views import BOTH


@pytest.mark.parametrize(
    ("fra", "lhr", "chosen"),
    [
        ("disk", "disk", "fra-1"),
        ("disk", "loading", "lhr-1"),
        ("disk", "warm", "lhr-1"),
        ("absent", "disk", "lhr-1"),
        ("absent", "fetching", "lhr-1"),
        ("warm", "loading", "fra-1"),
    ],
)
def test_the_least_change_wins_then_the_nearest(fra: str, lhr: str, chosen: str) -> None:
    mesh = Driver()
    mesh.view = view_of(TOPOLOGY, fra_1={A: {"warmth": fra}}, lhr_1={A: {"warmth": lhr}})
    mesh.ask(times=3)
    mesh.look()
    assert mesh.nodes() == (chosen,)


def test_free_memory_is_preferred_to_throwing_others_out() -> None:
    mesh = Driver()
    mesh.view = view_of(TOPOLOGY, fra_1={B: {"warmth": "warm"}})
    mesh.ask(times=3)
    mesh.look()
    assert mesh.nodes() == ("lhr-1",)


def test_the_demand_of_a_site_is_met_near_it() -> None:
    mesh = Driver()
    mesh.ask(site="lhr", times=5)
    mesh.ask(site="fra", times=2)
    mesh.look()
    assert mesh.nodes() == ("lhr-1",)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"phase": "connecting"}, "no link"),
        ({"draining": True}, "draining"),
        ({"version": 2}, "knows no Warm"),
        ({A: {"warm_refused": "two others answer"}}, "two others answer"),
        ({A: {"memory_bytes": 5 * GB}}, "5.0 GB do not fit in 4.0 GB"),
        ({"engines": {}}, "has said nothing of it yet"),
    ],
)
def test_nodes_that_cannot_are_named(change: dict[str, Any], why: str) -> None:
    mesh = Driver()
    mesh.view = view_of(TOPOLOGY, fra_1=change)
    mesh.ask(times=3)
    mesh.look()
    assert mesh.nodes() == ("lhr-1",)
    ((name, reason),) = mesh.decision().left_out
    assert name == "fra-1"
    assert why in reason


def test_what_stays_anyway_is_not_asked_for() -> None:
    pinned = topology_of({"fra-1": BOTH, "lhr-1": BOTH}, fra_1=(A,))
    mesh = Driver(pinned)
    mesh.view = view_of(pinned, fra_1={A: {"warmth": "warm"}})
    mesh.ask(times=3)
    assert mesh.look() == []
    assert mesh.nodes() == ("fra-1",)
    assert "keeps it anyway" in mesh.decision().why
    mesh = Driver()
    mesh.view = view_of(TOPOLOGY, fra_1={"memory_bytes": 0, A: {"warmth": "warm"}})
    mesh.ask(times=3)
    assert mesh.look() == []


def test_both_roles_are_placed() -> None:
    split = topology_of({"fra-1": ("prefill",), "lhr-1": ("decode",), "iad-1": BOTH})
    mesh = Driver(split)
    mesh.ask(times=3)
    assert {word.node for word in mesh.look()} == {"fra-1", "lhr-1"}
    assert mesh.decision().copies == 1


def test_regions_are_placed_apart() -> None:
    mesh = Driver()
    mesh.ask(times=3)
    mesh.ask(site="syd", times=3)
    assert {word.node for word in mesh.look()} == {"fra-1", "syd-1"}
    assert mesh.nodes(region="ap") == ("syd-1",)


def test_demand_beyond_one_node_gets_another_and_loses_it_late() -> None:
    mesh = Driver()
    mesh.run(120.0, ask_every=1.0, tokens=500)  # 500 tokens/s each way, where a node computes 1000
    assert mesh.decision().copies == 2
    assert set(mesh.nodes()) == {"fra-1", "lhr-1"}
    mesh.run(200.0, ask_every=10.0, tokens=10)
    assert mesh.decision().copies == 2
    mesh.run(400.0, ask_every=10.0, tokens=10)
    assert mesh.decision().copies == 1
    assert len(mesh.nodes()) == 1


# ---- no flapping -------------------------------------------------------------------------------


def test_a_chosen_node_stays_though_another_becomes_better() -> None:
    mesh = Driver()
    mesh.run(5.0, ask_every=1.0)
    mesh.view = view_of(TOPOLOGY, lhr_1={A: {"warmth": "warm"}})
    mesh.run(5.0, ask_every=0.2, site="lhr")
    assert mesh.nodes() == ("fra-1",)


def test_a_lost_link_is_waited_for_a_while() -> None:
    mesh = Driver()
    mesh.run(5.0, ask_every=1.0)
    mesh.view = view_of(TOPOLOGY, fra_1={"phase": "connecting"})
    mesh.run(MISSING_S - 2.0, ask_every=1.0)
    assert mesh.nodes() == ("fra-1",)
    mesh.view = view_of(TOPOLOGY)
    mesh.run(2.0, ask_every=1.0)
    assert {word.node for _, word in mesh.words} == {"fra-1"}
    mesh.view = view_of(TOPOLOGY, fra_1={"phase": "connecting"})
    mesh.run(MISSING_S + 3.0, ask_every=1.0)
    assert mesh.nodes() == ("lhr-1",)
    mesh.view = view_of(TOPOLOGY)
    mesh.run(5.0, ask_every=1.0)
    assert mesh.nodes() == ("lhr-1",)


def test_two_models_of_like_demand_do_not_take_turns_in_one_memory() -> None:
    one = topology_of({"fra-1": BOTH})
    mesh = Driver(one)
    mesh.run(60.0, ask_every=10.0, model=A)
    assert mesh.nodes(A) == ("fra-1",)
    for _ in range(20):
        mesh.ask(A)
        mesh.ask(B, times=2 if mesh.now % 2 else 1)
        mesh.run(7.0)
    assert (mesh.nodes(A), mesh.nodes(B)) == (("fra-1",), ())
    assert "3.0 GB do not fit in 1.0 GB beside others" in dict(mesh.decision(B).left_out)["fra-1"]
    assert {word.message.model for _, word in mesh.words} == {A}
    mesh.ask(B, times=200)  # now it is a different matter
    mesh.run(2.0)
    assert (mesh.nodes(A), mesh.nodes(B)) == ((), ("fra-1",))


def test_what_is_asked_for_rarely_is_not_shut_out_for_ever() -> None:
    """The only node keeps alpha; beta finds no memory, so the lease is left to end."""
    one = topology_of({"fra-1": BOTH})
    mesh = Driver(one)
    mesh.run(60.0, ask_every=2.0)
    kept = {A: {"warmth": "warm"}, B: {"warm_refused": "the others are in use"}}
    mesh.view = view_of(one, fra_1=kept)
    mesh.run(30.0, ask_every=2.0)
    assert mesh.words[-1][0] > mesh.now - LEASE_S / RESAY - 2 * LOOK_S  # nobody wants beta
    mesh.ask(B)
    mesh.run(LOOK_S + 0.1)
    before = len(mesh.words)
    mesh.run(LEASE_S, ask_every=2.0)
    assert len(mesh.words) == before
    assert "fra-1 yields to beta, which finds no memory anywhere" in mesh.decision().why
    mesh.view = view_of(one, fra_1={B: {"warmth": "warm"}})  # its next request had it loaded
    mesh.run(5.0, ask_every=2.0)
    assert [word.message.model for _, word in mesh.words[before:]] == [A]


def test_a_node_that_is_let_go_in_vain_is_taken_back() -> None:
    one = topology_of({"fra-1": BOTH})
    mesh = Driver(one)
    mesh.view = view_of(one, fra_1={A: {"warmth": "warm"}, B: {"warm_refused": "in use"}})
    mesh.run(60.0, ask_every=2.0)
    mesh.ask(B)
    mesh.run(LOOK_S + 0.1)
    before, at = len(mesh.words), mesh.now
    mesh.run(YIELD_S + 5.0, ask_every=2.0)
    again = [when for when, _ in mesh.words[before:]]
    assert again
    assert again[0] == pytest.approx(at + YIELD_S, abs=2 * LOOK_S)
