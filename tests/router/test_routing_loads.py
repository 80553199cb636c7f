"""Routing to nodes without the model in memory: waits, prices, and one load for a burst."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.routing.avoidance import NodeStart
from router.routing.loading import (
    CROWD,
    OVERRUN,
    UNKNOWN_FETCH_S,
    UNKNOWN_LOAD_S,
    is_cold,
    load_wait,
    needless_loads,
)
from router.routing.policy import Pin, choose
from router.routing.recovery import Broken, RunningPrefill, choose_recovery
from router.routing.refusals import REFUSED_S
from router.routing.view import Pending, View
from router.routing.view_builder import Reservation, ViewBuilder
from tests.fakes.fake_connection import FakeMesh
from tests.fakes.fake_node import FakeNode, idle_engine
from tests.router.router_mesh import MODEL, make_topology
from tests.router.views import BOTH, FOUR, FRA, IAD, offer, pair, pick, request, view_of
from topology.model import Model
from wire.errors import OverloadError
from wire.messages import Load, ModelOffer

NOWHERE = {"offers": {}}


def cold(warmth: str = "disk", eta_ms: int = 2000, **changes: Any) -> dict[str, Any]:
    """A node whose model is not in memory."""
    engine = {"ready": False, "warmth": warmth, "eta_ms": eta_ms, "warm_refused": ""}
    node = {name: changes.pop(name) for name in ("pending", "offers", "load_at") if name in changes}
    return {"engines": {MODEL: idle_engine(MODEL, **(engine | changes))}, **node}


def all_cold(**changes: dict[str, Any]) -> View:
    nodes = {name: cold() for name in ("fra_1", "lhr_1", "iad_1", "syd_1")}
    return view_of(FOUR, **(nodes | changes))


def term(view: View, name: str, **asked: Any) -> float:
    reasons = pick(view, request(**asked)).route.reasons
    return sum(reason.seconds for reason in reasons if reason.term == name)


# ---- the wait ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmth", "eta_ms", "age", "left", "begun"),
    [
        ("disk", 2000, 0.9, 2.0, False),
        ("loading", 2000, 0.5, 1.5, True),
        ("fetching", 60_000, 1.0, 59.0, True),
        ("absent", 60_000, 1.0, 60.0, False),
        ("loading", 2000, 30.0, OVERRUN * 2.0, True),
        ("disk", 0, 0.0, UNKNOWN_LOAD_S, False),
        ("absent", 0, 0.0, UNKNOWN_FETCH_S, False),
    ],
)
def test_an_estimate_goes_on_from_when_it_was_said(
    warmth: str, eta_ms: int, age: float, left: float, begun: bool
) -> None:
    node = all_cold(fra_1=cold(warmth, eta_ms)).nodes["fra-1"]
    wait = load_wait(node, MODEL, node.load_at + age)
    assert (wait.seconds, wait.begun) == (pytest.approx(left), begun)
    assert ("guess" in wait.detail) == (eta_ms == 0)


def test_what_this_router_asked_for_is_under_way_before_the_node_says_so() -> None:
    asked = cold("disk", 2000, pending={MODEL: Pending(wanted_at=10.0)})
    wait = load_wait(all_cold(fra_1=asked).nodes["fra-1"], MODEL, 10.5)
    assert (wait.seconds, wait.begun) == (pytest.approx(1.5), True)


@pytest.mark.parametrize("warmth", ["", "warm"])
def test_an_engine_that_is_down_is_no_load(warmth: str) -> None:
    node = all_cold(fra_1=cold(warmth)).nodes["fra-1"]
    assert not is_cold(node, MODEL)
    plan = pick(all_cold(fra_1=cold(warmth)), request())
    assert ("fra-1", "engine not ready") in plan.rejected


def test_a_second_load_has_to_be_much_sooner() -> None:
    def wait(warmth: str, eta_ms: int) -> Any:
        return load_wait(all_cold(fra_1=cold(warmth, eta_ms)).nodes["fra-1"], MODEL, 0.0)

    loading = ("a", wait("loading", 3000))
    assert needless_loads([loading, ("b", wait("disk", 1600))]) == {"b": "a is loading it already"}
    assert needless_loads([loading, ("b", wait("disk", 1400))]) == {}
    assert needless_loads([loading, ("b", wait("warm", 0))]) == {}
    assert needless_loads([("a", wait("disk", 9)), ("b", wait("disk", 9))]) == {}


# ---- rules and prices --------------------------------------------------------------------------


def test_a_cold_mesh_serves_near_the_client_and_says_what_it_waits_for() -> None:
    view = all_cold()
    assert pair(view, request(FRA)) == ("fra-1", "fra-1")
    assert pair(view, request(IAD)) == ("iad-1", "iad-1")
    assert term(view, "load") == pytest.approx(2.0)
    route = pick(view, request()).route
    assert (route.prefill_load_s, route.decode_load_s) == (2.0, 2.0)
    assert sum(reason.seconds for reason in route.reasons) == pytest.approx(route.cost_s)
    detail = next(reason.detail for reason in route.reasons if reason.term == "load")
    assert detail == "fra-1: on its disk, 2.0 s to go"


def test_a_model_in_memory_an_ocean_away_beats_one_on_the_disk_here() -> None:
    assert pair(all_cold(iad_1={}), request(FRA)) == ("iad-1", "iad-1")
    assert "load" not in {r.term for r in pick(all_cold(iad_1={}), request(FRA)).route.reasons}


def test_a_busy_node_is_left_for_a_load_once_that_is_cheaper() -> None:
    for queued, node in ((500, "iad-1"), (5000, "fra-1")):
        busy = {"engines": {MODEL: idle_engine(MODEL, queued_prefill_tokens=queued)}}
        assert pair(all_cold(iad_1=busy), request(FRA)) == (node, node)


def test_both_legs_load_at_the_same_time() -> None:
    topology = make_topology({"fra-1": ("prefill",), "lhr-1": ("decode",)})
    view = view_of(topology, fra_1=cold("disk", 3000), lhr_1=cold("disk", 5000))
    route = pick(view, request()).route
    assert term(view, "load") == pytest.approx(5.0)
    assert (route.prefill_load_s, route.decode_load_s) == (3.0, 5.0)
    assert sum(reason.seconds for reason in route.reasons) == pytest.approx(route.cost_s)


def test_a_cold_decode_node_needs_no_kv_address_yet() -> None:
    topology = make_topology({"fra-1": ("prefill",), "lhr-1": ("decode",)})
    silent = {MODEL: offer(kv_address="")}
    view = view_of(topology, lhr_1=cold(offers=silent))
    assert pair(view, request()) == ("fra-1", "lhr-1")
    with pytest.raises(OverloadError, match="hand over"):
        pick(view_of(topology, lhr_1={"offers": silent}), request())


def test_a_model_that_is_nowhere_yet_is_fetched_by_one_node_alone() -> None:
    absent = cold("absent", 60_000, offers={})
    view = view_of(FOUR, fra_1=absent, lhr_1=absent, iad_1=NOWHERE, syd_1=NOWHERE)
    assert pair(view, request()) == ("fra-1", "fra-1")
    assert term(view, "load") == pytest.approx(60.0)


@pytest.mark.parametrize("left", [0.5, 2.0, 2.05])
def test_nothing_is_loaded_for_a_request_whose_deadline_cannot_be_met(left: float) -> None:
    """2 s of loading and 0.1 s of prefill do not fit."""
    late = request(deadline=left)
    with pytest.raises(OverloadError) as caught:
        pick(all_cold(syd_1=cold("loading", 7000)), late)
    assert caught.value.code == "no_route"
    assert caught.value.retry_after_s == pytest.approx(2.0)
    assert "fra-1: on its disk, 2.0 s to go, too late" in caught.value.message
    assert "syd-1: loading, 7.0 s to go, too late" in caught.value.message
    assert pair(all_cold(syd_1={}), late) == ("syd-1", "syd-1")
    assert pair(all_cold(), request(deadline=2.2)) == ("fra-1", "fra-1")


def test_a_node_that_cannot_load_it_is_out_and_says_why() -> None:
    full = cold(warm_refused="two others are answering")
    plan = pick(all_cold(fra_1=full), request())
    assert plan.route.prefill == "lhr-1"
    assert ("fra-1", "cannot load it: two others are answering") in plan.rejected
    everywhere = dict.fromkeys(("fra_1", "lhr_1", "iad_1", "syd_1"), full)
    with pytest.raises(OverloadError, match="two others") as caught:
        pick(view_of(FOUR, **everywhere), request())
    assert caught.value.retry_after_s == REFUSED_S


def test_what_an_engine_said_is_for_operators_and_not_for_clients() -> None:
    why = "cannot load it: the engine of small does not come up"
    broken = cold(warm_refused=f"{why[16:]}: OSError: no such file: /srv/chunk-3")
    plan = pick(all_cold(fra_1=broken), request())
    assert ("fra-1", f"{why}: OSError: no such file: /srv/chunk-3") in plan.rejected
    everywhere = dict.fromkeys(("fra_1", "lhr_1", "iad_1", "syd_1"), broken)
    with pytest.raises(OverloadError, match=f"fra-1: {why}; ") as caught:
        pick(view_of(FOUR, **everywhere), request())
    assert "/srv" not in caught.value.message


def test_residency_holds_for_loads() -> None:
    topology = replace(FOUR, models={MODEL: Model(MODEL, regions=frozenset({"ap"}))})
    view = view_of(topology, **{name: cold() for name in ("fra_1", "lhr_1", "iad_1", "syd_1")})
    assert pair(view, request(FRA)) == ("syd-1", "syd-1")
    with pytest.raises(OverloadError, match="region"):
        pick(view, request(FRA, regions=frozenset({"eu"})))


def test_a_pin_may_make_a_node_load() -> None:
    view = all_cold(fra_1=cold("loading"))
    assert pair(view, request(pin=Pin("syd-1", "syd-1"))) == ("syd-1", "syd-1")


def test_the_running_prefill_leg_is_not_handed_to_a_node_that_has_to_load() -> None:
    view = all_cold(fra_1={})
    running = RunningPrefill(NodeStart("fra-1", "1"), 0.0, frozenset())
    broken = Broken(frozenset(), frozenset(), {}, running, relayed=0)
    choice = choose_recovery(request(), broken, view, 0.0, random.Random(0))
    assert (choice.keeps_prefill, choice.recovery.kind) == (False, "recompute")


# ---- one load for a burst ----------------------------------------------------------------------


def burst(count: int, tokens: int = 100) -> dict[str, int]:
    """Where ``count`` requests go at once, while no node has said anything new."""
    topology = FOUR
    builder = ViewBuilder(topology, "fra")
    builder.set_directory(dict.fromkeys(topology.nodes, False))
    for name, node in topology.nodes.items():
        fake = FakeNode(name, node.site, FakeMesh(), model=MODEL, warmth="disk", eta_ms=2000)
        builder.link_up(name, fake.hello())
        builder.set_load(name, fake.load_message(), 0.0)
    went: dict[str, int] = {}
    for number in range(count):
        now = 0.001 * number
        route = choose(request(tokens=tokens), builder.snapshot(), now, random.Random(number)).route
        for node in {route.prefill, route.decode}:
            went[node] = went.get(node, 0) + 1
            builder.reserve(node, number, Reservation(MODEL, tokens, 1, now))
    return went


@pytest.mark.parametrize("count", [2, 50, CROWD])
def test_a_burst_for_a_cold_model_makes_one_node_load_it(count: int) -> None:
    assert burst(count) == {"fra-1": count}


def test_a_crowd_is_a_reason_for_a_second_load_and_no_more() -> None:
    assert burst(2 * CROWD) == {"fra-1": CROWD, "lhr-1": CROWD}
    waits = cold("loading", 2000, waiting=CROWD)
    assert pair(all_cold(fra_1=waits), request(FRA))[1] == "lhr-1"
    near = cold("loading", 2000, waiting=CROWD - 1)
    assert pair(all_cold(fra_1=near), request(FRA)) == ("fra-1", "fra-1")


def test_routers_agree_on_who_loads() -> None:
    twins = make_topology({"fra-1": BOTH, "fra-2": BOTH, "fra-3": BOTH})
    view = view_of(twins, **{name: cold() for name in ("fra_1", "fra_2", "fra_3")})
    chosen = {pick(view, request(), seed).route.prefill for seed in range(40)}
    assert chosen == {"fra-1"}


def test_a_word_to_load_counts_until_the_node_has_said_something_newer() -> None:
    builder = ViewBuilder(FOUR, "fra")
    builder.set_directory({"fra-1": False})
    fake = FakeNode("fra-1", "fra", FakeMesh(), model=MODEL, warmth="disk", eta_ms=2000)
    builder.link_up("fra-1", fake.hello())
    builder.set_rtt("fra-1", 100.0)
    builder.set_load("fra-1", fake.load_message(), 0.0)
    builder.set_wanted("fra-1", MODEL, 1.0)
    builder.set_wanted("fra-1", MODEL, 1.5)

    def wanted_at() -> float | None:
        return builder.snapshot().nodes["fra-1"].pending.get(MODEL, Pending()).wanted_at

    assert wanted_at() == 1.0
    builder.set_load("fra-1", fake.load_message(), 1.05)  # said before it could know
    assert wanted_at() == 1.0
    builder.set_load("fra-1", fake.load_message(), 1.2)
    assert wanted_at() is None


def test_offers_replace_those_of_the_greeting() -> None:
    builder = ViewBuilder(FOUR, "fra")
    builder.set_directory({"fra-1": False})
    fake = FakeNode("fra-1", "fra", FakeMesh(), model=MODEL)
    builder.set_offers("fra-1", [])  # the link is not up: nothing to replace
    builder.link_up("fra-1", fake.hello())
    assert builder.snapshot().offered == {MODEL: ("fra-1",)}
    other = ModelOffer("other", "cd", 1, 1, 1, 1, "float32", "127.0.0.1:9")
    builder.set_offers("fra-1", [other])
    view = builder.snapshot()
    assert view.offered == {"other": ("fra-1",)}
    assert view.nodes["fra-1"].offers == {"other": other}
    assert view.nodes["fra-1"].incarnation == "fra-1-0"


def test_the_view_shows_the_memory_of_nodes() -> None:
    builder = ViewBuilder(FOUR, "fra")
    builder.set_directory({"fra-1": False})
    fake = FakeNode("fra-1", "fra", FakeMesh(), model=MODEL)
    builder.link_up("fra-1", fake.hello())
    builder.set_load("fra-1", Load([], [], False, 4_000, 1_000), 0.0)
    node = builder.snapshot().nodes["fra-1"]
    assert (node.memory_bytes, node.memory_used_bytes) == (4_000, 1_000)


STATES = st.tuples(
    st.sampled_from(["", "warm", "loading", "disk", "fetching", "absent"]),
    st.booleans(),  # refused
    st.integers(0, 30_000),  # eta
    st.sampled_from([None, -1.0, 0.0]),  # wanted at
    st.booleans(),  # offered
)


@settings(max_examples=200, deadline=None)
@given(
    states=st.lists(STATES, min_size=4, max_size=4),
    deadline=st.one_of(st.just(math.inf), st.floats(0.2, 40.0)),
    seed=st.integers(0, 100),
)
def test_no_plan_loads_what_it_must_not(states: list[Any], deadline: float, seed: int) -> None:
    names = ("fra_1", "lhr_1", "iad_1", "syd_1")
    changes = {}
    for name, (warmth, refused, eta_ms, wanted_at, offered) in zip(names, states, strict=True):
        changes[name] = cold(
            warmth,
            eta_ms,
            ready=warmth == "warm",
            warm_refused="full" if refused else "",
            pending={MODEL: Pending(wanted_at=wanted_at)},
            offers={MODEL: offer()} if offered else {},
        )
    view = view_of(FOUR, **changes)
    asked = request(deadline=deadline)
    try:
        plan = pick(view, asked, seed)
    except OverloadError:
        return
    for route in (plan.route, *plan.fallbacks):
        assert sum(r.seconds for r in route.reasons) == pytest.approx(route.cost_s)
        waits = {
            route.prefill: route.prefill_load_s,
            route.decode: route.decode_load_s,
        }
        for name, wait_s in waits.items():
            engine = view.nodes[name].engines[MODEL]
            assert engine.ready or engine.warmth not in ("", "warm")
            assert (wait_s == 0) == engine.ready
            if wait_s:
                assert wait_s < deadline
                assert not engine.warm_refused


@settings(max_examples=100, deadline=None)
@given(
    etas=st.lists(st.sampled_from([0, 500, 4000, 20_000]), min_size=4, max_size=4),
    queued=st.lists(st.integers(0, 5000), min_size=4, max_size=4),
    tokens=st.integers(1, 4000),
)
def test_the_search_finds_the_cheapest_pair_of_cold_and_warm_nodes(
    etas: list[int], queued: list[int], tokens: int
) -> None:
    """Against brute force: pinning every pair in turn finds nothing cheaper."""
    split = make_topology(
        {"fra-1": BOTH, "lhr-1": BOTH, "iad-1": ("prefill",), "syd-1": ("decode",)}
    )
    changes = {
        name.replace("-", "_"): cold("disk", eta_ms, ready=eta_ms == 0, queued_prefill_tokens=some)
        for name, eta_ms, some in zip(split.nodes, etas, queued, strict=True)
    }
    view, asked = view_of(split, **changes), request(tokens=tokens)
    costs = [
        pick(view, replace(asked, pin=Pin(p, d))).route.cost_s
        for p in ("fra-1", "lhr-1", "iad-1")
        for d in ("fra-1", "lhr-1", "syd-1")
    ]
    plan = pick(view, asked)
    ranked = [plan.route.cost_s, *(route.cost_s for route in plan.fallbacks)]
    assert min(ranked) == pytest.approx(min(costs))
    assert sorted(ranked) == pytest.approx(sorted(costs)[: len(ranked)])
