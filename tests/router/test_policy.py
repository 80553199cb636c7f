"""Routing as a pure function: hard rules first, then costs that can be followed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.routing.costs import Work
from router.routing.policy import Pin, choose
from router.routing.view import Pending
from tests.fakes.fake_node import idle_engine
from tests.router.router_mesh import MODEL, make_topology
from tests.router.views import BOTH, FOUR, FRA, IAD, SYD, offer, pair, pick, request, view_of
from topology.model import Model, Position
from wire.errors import OverloadError, RequestError
from wire.messages import LinkRate


@pytest.mark.parametrize(("client", "node"), [(FRA, "fra-1"), (IAD, "iad-1"), (SYD, "syd-1")])
def test_an_idle_mesh_serves_near_the_client_in_one_place(client: Position, node: str) -> None:
    assert pair(view_of(FOUR), request(client)) == (node, node)


def test_roles_force_a_pair() -> None:
    assert pair(view_of(make_topology()), request()) == ("fra-1", "lhr-1")


def test_a_busy_decode_sends_the_decode_elsewhere() -> None:
    busy = {"engines": {MODEL: idle_engine(MODEL, running=32, decode_step_ms=200.0)}}
    prefill, decode = pair(view_of(FOUR, fra_1=busy), request(tokens=400))
    assert (prefill, decode) != ("fra-1", "fra-1")
    assert decode == "lhr-1"


def test_a_queue_sends_the_prefill_elsewhere() -> None:
    busy = {"engines": {MODEL: idle_engine(MODEL, queued_prefill_tokens=5000)}}
    assert pair(view_of(FOUR, fra_1=busy), request()) == ("lhr-1", "lhr-1")


def test_own_requests_in_flight_count_before_any_load_push() -> None:
    sent = {"pending": {MODEL: Pending(prefill_tokens=5000, streams=3)}}
    assert pair(view_of(FOUR, fra_1=sent), request()) == ("lhr-1", "lhr-1")


def test_an_old_queue_has_been_worked_on() -> None:
    busy = {"engines": {MODEL: idle_engine(MODEL, queued_prefill_tokens=500)}}
    view = view_of(FOUR, fra_1=busy)
    later = choose(request(), view, 1.0, random.Random(0))
    assert later.route.prefill == "fra-1"


def test_a_cached_prefix_beats_distance() -> None:
    asked = request(tokens=3000, cached={"iad-1": 2900})
    assert pair(view_of(FOUR), asked) == ("iad-1", "iad-1")


def test_a_slow_link_is_avoided_by_long_prompts() -> None:
    topology = make_topology({"fra-1": ("prefill",), "lhr-1": ("decode",), "iad-1": BOTH})
    slow = {"links": {"lhr-1": LinkRate("lhr-1", 15.0, 1e6)}}
    view = view_of(topology, fra_1=slow)
    assert pair(view, request(tokens=3000)) != ("fra-1", "lhr-1")
    assert pair(view, request(tokens=2)) == ("fra-1", "lhr-1")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"phase": "connecting"}, "no link"),
        ({"draining": True}, "draining"),
        ({"offers": {}}, "does not serve"),
        ({"engines": {}}, "not ready"),
        ({"engines": {MODEL: idle_engine(MODEL, ready=False)}}, "not ready"),
        ({"offers": {MODEL: offer(total_blocks=4)}}, "holds 64 tokens"),
    ],
)
def test_hard_rules_are_named(change: dict[str, Any], why: str) -> None:
    plan = pick(view_of(FOUR, fra_1=change), request())
    assert plan.route.prefill != "fra-1"
    (reason,) = [reason for name, reason in plan.rejected if name == "fra-1"]
    assert why in reason


def test_too_long_a_prompt_is_left_to_the_node() -> None:
    assert pick(view_of(FOUR), request(tokens=100_000)).route


def test_tenant_and_model_residency_hold_for_both_legs() -> None:
    eu = pick(view_of(FOUR), request(IAD, regions=frozenset({"eu"})))
    assert {eu.route.prefill_site, eu.route.decode_site} <= {"fra", "lhr"}
    topology = replace(FOUR, models={MODEL: Model(MODEL, regions=frozenset({"ap"}))})
    assert pair(view_of(topology), request(FRA)) == ("syd-1", "syd-1")
    with pytest.raises(OverloadError, match="region"):
        pick(view_of(topology), request(FRA, regions=frozenset({"eu"})))


def test_different_models_never_hand_over() -> None:
    other = {"offers": {MODEL: offer(identity="beef")}}
    with pytest.raises(OverloadError, match="hand over"):
        pick(
            view_of(make_topology({"fra-1": ("prefill",), "lhr-1": ("decode",)}), lhr_1=other),
            request(),
        )


def test_a_pinned_digest_excludes_others() -> None:
    topology = replace(FOUR, models={MODEL: Model(MODEL, digest="beef")})
    with pytest.raises(OverloadError, match="pins"):
        pick(view_of(topology), request())


def test_unknown_models_and_pins() -> None:
    with pytest.raises(RequestError) as caught:
        choose(replace(request(), work=Work("gpt", 1, 1, {})), view_of(FOUR), 0, random.Random())
    assert caught.value.code == "model_not_found"
    assert MODEL in caught.value.message
    for pin in (Pin("nowhere"), Pin(decode="fra-1")):
        with pytest.raises(RequestError) as caught:
            pick(view_of(make_topology()), request(pin=pin))
        assert caught.value.code == "invalid_value"
    assert pair(view_of(FOUR), request(pin=Pin("syd-1", "iad-1"))) == ("syd-1", "iad-1")


def test_avoided_nodes_and_pairs() -> None:
    view = view_of(FOUR)
    assert "fra-1" not in pair(view, request(avoid_nodes=frozenset({"fra-1"})))
    asked = request(avoid_pairs=frozenset({("fra-1", "fra-1")}))
    assert pair(view, asked) != ("fra-1", "fra-1")


def test_ties_are_spread() -> None:
    topology = make_topology({"fra-1": BOTH, "fra-2": BOTH, "fra-3": BOTH})
    view = view_of(topology)
    chosen = {pick(view, request(), seed).route.prefill for seed in range(40)}
    assert len(chosen) > 1


def test_an_idle_node_is_cheaper_than_its_busy_twin() -> None:
    """The step is measured while at least one sequence runs, also where none runs any more."""
    topology = make_topology({"fra-1": BOTH, "fra-2": BOTH})
    busy = {"engines": {MODEL: idle_engine(MODEL, running=1, decode_step_ms=100.0)}}
    idle = {"engines": {MODEL: idle_engine(MODEL, decode_step_ms=100.0)}}
    view = view_of(topology, fra_1=busy, fra_2=idle)
    assert pair(view, request(tokens=1)) == ("fra-2", "fra-2")
    decode = next(r for r in pick(view, request()).route.reasons if r.term == "decode")
    assert decode.seconds == pytest.approx(0.25 * 128 * 0.1)
    assert "0.25 x 128 tokens" in decode.detail


@pytest.mark.parametrize("seed", range(20))
def test_a_hand_over_must_gain_something(seed: int) -> None:
    """Among ties a pair of nodes would only spend bandwidth, which costs do not price."""
    view = view_of(make_topology({"fra-1": BOTH, "fra-2": BOTH, "fra-3": BOTH}))
    route = pick(view, request(tokens=3000), seed).route
    assert route.prefill == route.decode


nodes_of = st.lists(
    st.tuples(
        st.sampled_from(["fra", "lhr", "iad", "syd"]),
        st.sampled_from([("prefill",), ("decode",), BOTH]),
        st.booleans(),  # draining
        st.booleans(),  # ready
        st.integers(0, 20_000),  # queued
        st.integers(0, 64),  # running
        st.sampled_from(["00ff", "beef"]),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=300, deadline=None)
@given(
    made=nodes_of,
    client=st.sampled_from([FRA, IAD, SYD]),
    tokens=st.integers(1, 5000),
    regions=st.sets(st.sampled_from(["eu", "na", "ap"])),
    seed=st.integers(0, 1000),
)
def test_no_plan_breaks_a_hard_rule_and_reasons_add_up(
    made: list[Any], client: Position, tokens: int, regions: set[str], seed: int
) -> None:
    names = [f"{site}-{i}" for i, (site, *_) in enumerate(made)]
    topology = make_topology({name: facts[1] for name, facts in zip(names, made, strict=True)})
    changes = {
        name.replace("-", "_"): {
            "draining": draining,
            "engines": {
                MODEL: idle_engine(
                    MODEL, ready=ready, queued_prefill_tokens=queued, running=running
                )
            },
            "offers": {MODEL: offer(identity=identity)},
        }
        for name, (_, _, draining, ready, queued, running, identity) in zip(
            names, made, strict=True
        )
    }
    view = view_of(topology, **changes)
    asked = request(client, tokens, regions=frozenset(regions))
    try:
        plan = pick(view, asked, seed)
    except OverloadError:  # nobody qualifies, or no two together
        return
    assert plan == pick(view, asked, seed)
    routes = [plan.route, *plan.fallbacks]
    assert len({(r.prefill, r.decode) for r in routes}) == len(routes)
    for found in routes:
        p, d = view.nodes[found.prefill], view.nodes[found.decode]
        assert "prefill" in p.roles
        assert "decode" in d.roles
        for node in (p, d):
            assert not node.draining
            assert node.engines[MODEL].ready
            assert not regions or node.region in regions
        assert p.name == d.name or p.offers[MODEL].identity == d.offers[MODEL].identity
        assert all(reason.seconds >= 0 for reason in found.reasons)
        assert sum(reason.seconds for reason in found.reasons) == pytest.approx(found.cost_s)


@settings(max_examples=100, deadline=None)
@given(made=nodes_of, client=st.sampled_from([FRA, IAD, SYD]), tokens=st.integers(1, 5000))
def test_the_search_finds_the_cheapest_pair(made: list[Any], client: Position, tokens: int) -> None:
    """Against brute force: pinning every pair in turn finds nothing cheaper."""
    names = [f"{site}-{i}" for i, (site, *_) in enumerate(made)]
    topology = make_topology({name: facts[1] for name, facts in zip(names, made, strict=True)})
    changes = {
        name.replace("-", "_"): {
            "engines": {MODEL: idle_engine(MODEL, queued_prefill_tokens=facts[4], running=facts[5])}
        }
        for name, facts in zip(names, made, strict=True)
    }
    view = view_of(topology, **changes)
    asked = request(client, tokens)
    costs = [
        pick(view, replace(asked, pin=Pin(p, d))).route.cost_s
        for p in names
        for d in names
        if "prefill" in view.nodes[p].roles and "decode" in view.nodes[d].roles
    ]
    if not costs:
        return
    plan = pick(view, asked)
    best = min(route.cost_s for route in (plan.route, *plan.fallbacks))
    assert best == pytest.approx(min(costs))
    ranked = [route.cost_s for route in plan.fallbacks]
    assert ranked == pytest.approx(sorted(ranked))
