"""Which recovery is chosen, and why: both prices, live incarnations, avoidance that ends."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.routing.avoidance import NodeStart, Pair
from router.routing.costs import Work
from router.routing.policy import Pin, RouteRequest
from router.routing.recovery import (
    SALVAGE_MOST_S,
    Broken,
    Choice,
    RunningPrefill,
    choose_recovery,
    salvage_patience_s,
)
from router.routing.view import View
from tests.fakes.fake_node import idle_engine
from tests.router import views
from tests.router.router_mesh import MODEL, make_topology
from tests.router.views import BOTH, FRA
from wire.errors import OverloadError
from wire.messages import LinkRate, ModelOffer

MESH = make_topology({"fra-1": ("prefill",), "lhr-1": BOTH, "iad-1": BOTH})


def view_of(**changes: dict[str, Any]) -> View:
    """All nodes up and idle in incarnation "1", but for ``changes`` (``-`` written ``_``)."""
    return views.view_of(MESH, **changes)


def start(name: str, incarnation: str = "1") -> NodeStart:
    return NodeStart(name, incarnation)


def broken(**changes: Any) -> Broken:
    nothing = Broken(frozenset(), frozenset(), {}, None, 0)
    return replace(nothing, **changes)


def running(remaining_s: float = 0.0, barred: tuple[str, ...] = ()) -> RunningPrefill:
    return RunningPrefill(start("fra-1"), remaining_s, frozenset(barred))


def pick(what: Broken, view: View | None = None, tokens: int = 3000, **request: Any) -> Choice:
    asked = RouteRequest(Work(MODEL, tokens, 128, request.pop("cached", {})), FRA, **request)
    return choose_recovery(asked, what, view or view_of(), 0.0, random.Random(0))


# ---- keep the prefill leg ----------------------------------------------------------------------


def test_a_finished_prefill_is_worth_keeping() -> None:
    choice = pick(broken(running=running()))
    assert choice.keeps_prefill
    assert (choice.route.prefill, choice.route.decode) == ("fra-1", "lhr-1")
    assert choice.recovery.kind == "retarget"
    assert choice.recovery.other_kind == "recompute"
    assert choice.recovery.price_s == pytest.approx(choice.route.cost_s)
    assert choice.recovery.other_price_s is not None
    assert choice.recovery.other_price_s > choice.recovery.price_s + 2.0  # 3,000 tokens at 1,000/s
    terms = {reason.term: reason for reason in choice.route.reasons}
    assert terms["prefill"].seconds == 0.0
    assert "60.00 MB" in terms["kv_tail"].detail  # all of it has to be sent


def test_a_slow_link_makes_a_new_plan_cheaper() -> None:
    slow = {"links": {name: LinkRate(name, 15.0, 1e6) for name in ("lhr-1", "iad-1")}}
    choice = pick(broken(running=running(), relayed=1), view_of(fra_1=slow), tokens=300)
    assert not choice.keeps_prefill
    assert (choice.recovery.kind, choice.recovery.other_kind) == ("resume", "retarget")
    assert choice.recovery.other_price_s is not None
    assert choice.recovery.other_price_s > choice.recovery.price_s


def test_what_remains_to_compute_is_priced_and_hides_the_transfer() -> None:
    at_rest = pick(broken(running=running())).route
    computing = pick(broken(running=running(remaining_s=2.0))).route
    tail = {r.term: r.seconds for r in computing.reasons}["kv_tail"]
    assert tail < {r.term: r.seconds for r in at_rest.reasons}["kv_tail"]
    assert computing.cost_s > at_rest.cost_s


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"incarnation": "2"},
        {"phase": "connecting", "incarnation": "", "engines": {}},
        {"engines": {MODEL: idle_engine(MODEL, ready=False)}},
    ],
    ids=["old wire", "reborn", "link lost", "engine dead"],
)
def test_a_prefill_leg_that_cannot_be_told_is_not_kept(change: dict[str, Any]) -> None:
    assert not pick(broken(running=running()), view_of(fra_1=change)).keeps_prefill


def test_a_draining_prefill_node_still_hands_over() -> None:
    assert pick(broken(running=running()), view_of(fra_1={"draining": True})).keeps_prefill


def test_rules_hold_for_the_new_decode_node() -> None:
    what = broken(running=running(barred=("lhr-1",)))
    assert pick(what).route.decode == "iad-1"
    assert (
        pick(broken(running=running()), view_of(lhr_1={"draining": True})).route.decode == "iad-1"
    )
    other = {"offers": {MODEL: ModelOffer(MODEL, "beef", 4096, 1, 16, 1024, "float32", "a:1")}}
    assert pick(broken(running=running()), view_of(lhr_1=other)).route.decode == "iad-1"
    pinned = pick(broken(running=running()), pin=Pin(decode="iad-1"))
    assert (pinned.keeps_prefill, pinned.route.decode) == (True, "iad-1")
    pair = Pair(start("fra-1"), start("lhr-1"))
    assert pick(broken(running=running(), avoid_pairs=frozenset({pair}))).route.decode == "iad-1"
    eu = pick(what, regions=frozenset({"eu"}))
    assert (eu.route.prefill, eu.route.decode) == ("lhr-1", "lhr-1")  # a new plan, a new stream


# ---- new plans ---------------------------------------------------------------------------------


def test_kept_tokens_are_priced_as_cached() -> None:
    choice = pick(broken(kept={start("iad-1"): 2900}))
    assert (choice.route.prefill, choice.route.decode) == ("iad-1", "iad-1")
    assert (choice.recovery.kind, choice.recovery.other_kind) == ("salvage", "recompute")
    assert choice.recovery.other_price_s is not None
    assert choice.recovery.other_price_s > choice.recovery.price_s + 1.0


def test_kept_tokens_of_an_older_start_are_void() -> None:
    choice = pick(broken(kept={start("iad-1", "0"): 2900}))
    assert choice.route.prefill != "iad-1"
    assert (choice.recovery.kind, choice.recovery.other_kind) == ("recompute", None)


def test_little_kept_far_away_is_left_there() -> None:
    assert pick(broken(kept={start("iad-1"): 16}, relayed=4)).recovery.kind == "resume"


def test_avoidance_ends_with_the_incarnation() -> None:
    near = pick(broken()).route.decode
    avoided = frozenset({start(near)})
    assert pick(broken(avoid_nodes=avoided)).route.decode != near
    reborn = view_of(**{near.replace("-", "_"): {"incarnation": "2"}})
    assert pick(broken(avoid_nodes=avoided), reborn).route.decode == near


def test_when_everything_is_avoided_nothing_is() -> None:
    every = frozenset(start(name) for name in MESH.nodes)
    assert pick(broken(avoid_nodes=every)).route == pick(broken()).route
    with pytest.raises(OverloadError):
        pick(broken(avoid_nodes=every), regions=frozenset({"ap"}))


def test_relayed_tokens_are_part_of_the_prompt() -> None:
    def uncached(choice: Choice) -> str:
        return next(r.detail for r in choice.route.reasons if r.term == "prefill")

    assert "3000 tokens" in uncached(pick(broken()))
    assert "3100 tokens" in uncached(pick(broken(relayed=100)))


@settings(max_examples=150, deadline=None)
@given(
    remaining=st.floats(0.0, 5.0),
    rate=st.floats(1e5, 1e9),
    tokens=st.integers(1, 4000),
    kept=st.integers(0, 4000),
    relayed=st.integers(0, 50),
    seed=st.integers(0, 99),
)
def test_the_cheaper_one_is_chosen_and_the_choice_can_be_replayed(
    remaining: float, rate: float, tokens: int, kept: int, relayed: int, seed: int
) -> None:
    links = {name: LinkRate(name, 15.0, rate) for name in ("lhr-1", "iad-1")}
    view = view_of(fra_1={"links": links})
    what = broken(
        running=running(remaining), kept={start("lhr-1"): kept} if kept else {}, relayed=relayed
    )
    asked = RouteRequest(Work(MODEL, tokens, 128, {}), FRA)
    choice = choose_recovery(asked, what, view, 0.0, random.Random(seed))
    assert choice == choose_recovery(asked, what, view, 0.0, random.Random(seed))
    recovery = choice.recovery
    assert recovery.price_s == pytest.approx(choice.route.cost_s)
    assert sum(r.seconds for r in choice.route.reasons) == pytest.approx(recovery.price_s)
    assert recovery.other_price_s is not None
    assert recovery.price_s <= recovery.other_price_s
    assert choice.keeps_prefill == (recovery.kind == "retarget")


# ---- salvage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "cached", "seconds"),
    [
        (400, {}, 0.2),  # half of 400 tokens at 1,000/s
        (4000, {}, SALVAGE_MOST_S),
        (4000, {"iad-1": 3800}, 0.1),
        (20, {}, 0.0),  # asking takes as long
    ],
)
def test_patience_for_salvage_is_half_of_what_it_saves(
    tokens: int, cached: dict[str, int], seconds: float
) -> None:
    assert salvage_patience_s(Work(MODEL, tokens, 128, cached), view_of()) == pytest.approx(seconds)


def test_without_a_ready_engine_nothing_is_worth_waiting_for() -> None:
    gone = {"engines": {}}
    view = view_of(fra_1=gone, lhr_1=gone, iad_1=gone)
    assert salvage_patience_s(Work(MODEL, 4000, 128, {}), view) == 0.0
