"""Placement: what counts as demand, when a model is kept in memory, and for how long."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from router.placement.demand import MEMORY_S, Demand, DemandSites
from router.placement.leases import LEASE_S, RESAY
from router.placement.machine import LOOK_S
from tests.router.placement_driver import TOPOLOGY, A, B, Driver, topology_of, view_of
from tests.router.views import BOTH, FRA, IAD, SYD
from topology.model import Model, Placement


def test_a_steady_rate_is_found_and_forgotten() -> None:
    demand = Demand()
    for second in range(0, 600, 10):
        demand.add(A, "fra", 100, 20, float(second))
    rates = demand.rates(A, frozenset({"fra", "lhr"}), 595.0)
    assert rates.per_min == pytest.approx(6.0, rel=0.02)
    assert rates.prompt_tokens_per_s == pytest.approx(10.0, rel=0.02)
    assert rates.output_tokens_per_s == pytest.approx(2.0, rel=0.02)
    assert demand.rates(A, frozenset({"iad"}), 595.0).per_min == 0.0
    later = demand.rates(A, frozenset({"fra"}), 595.0 + MEMORY_S)
    assert later.per_min == pytest.approx(rates.per_min / math.e)
    demand.forget(595.0 + 8 * MEMORY_S)
    assert list(demand) == []


def test_demand_counts_where_residency_lets_it_be_met() -> None:
    topology = topology_of({"fra-1": BOTH, "iad-1": BOTH})
    sites = DemandSites(topology)
    assert sites.site_of(IAD, A, frozenset()) == "iad"
    assert sites.site_of(IAD, A, frozenset({"eu"})) == "fra"
    assert sites.site_of(SYD, A, frozenset()) in ("iad", "fra")  # no node of its own region
    assert sites.site_of(FRA, A, frozenset({"ap"})) is None
    assert sites.site_of(FRA, "unheard-of", frozenset()) is None
    models = {A: Model(A, regions=frozenset({"na"})), B: Model(B)}
    sites = DemandSites(replace(topology, models=models))
    assert sites.site_of(FRA, A, frozenset()) == "iad"
    assert sites.site_of(FRA, A, frozenset({"eu"})) is None


# ---- when --------------------------------------------------------------------------------------


def test_a_region_that_asks_often_gets_the_model_before_its_next_request() -> None:
    mesh = Driver()
    mesh.ask()
    assert mesh.run(1.5) == []
    assert mesh.decision().why == "asked 1.0 times a minute, 2 are needed"
    mesh.ask(times=2)
    assert mesh.machine.next_deadline() == mesh.now
    (word,) = mesh.look()
    assert (word.node, word.message.model, word.message.hold_ms) == ("fra-1", A, LEASE_S * 1e3)
    decision = mesh.decision()
    assert (decision.nodes, decision.copies) == (("fra-1",), 1)
    assert "2 are enough; fra-1 has it on its disk, 4.0 GB of 4.0 GB free, 0 km" in decision.why


def test_nothing_is_placed_where_the_rules_say_so() -> None:
    mesh = Driver(topology_of({"fra-1": BOTH}, Placement(warm_per_min=0.0)))
    mesh.ask(times=100)
    assert mesh.machine.next_deadline() is None


def test_a_lease_lasts_as_long_as_the_demand_and_the_rule_beyond_it() -> None:
    mesh = Driver()
    mesh.run(1000.0, ask_every=10.0)
    times = [at for at, _ in mesh.words]
    gaps = [b - a for a, b in pairwise(times)]
    assert all(0.0 <= gap - LEASE_S / RESAY <= 2 * LOOK_S for gap in gaps)
    mesh.run(600.0)
    ended = max(at + word.message.hold_ms / 1e3 for at, word in mesh.words)
    # 6 a minute fade to 2 in MEMORY_S * ln 3; then it cools.
    faded = 990.0 + MEMORY_S * math.log(3)
    assert ended == pytest.approx(faded + 300.0, abs=5.0)
    assert mesh.machine.decisions == ()
    assert mesh.machine.next_deadline() is None


@pytest.mark.parametrize(("cool_after_s", "every_s"), [(0.0, 1.0), (86_400.0, 20.0)])
def test_no_lease_ends_while_there_is_demand(cool_after_s: float, every_s: float) -> None:
    mesh = Driver(topology_of({"fra-1": BOTH}, Placement(2.0, cool_after_s)))
    mesh.run(4000.0, ask_every=10.0)
    ends = [at + word.message.hold_ms / 1e3 for at, word in mesh.words]
    starts = [at for at, _ in mesh.words]
    assert all(end > start for end, start in zip(ends, starts[1:], strict=False))
    assert ends[-1] > mesh.now
    assert len(starts) <= 4000.0 / every_s + 1
    assert max(word.message.hold_ms for _, word in mesh.words) <= LEASE_S * 1e3


def test_what_cools_says_so() -> None:
    mesh = Driver()
    mesh.run(100.0, ask_every=10.0)
    mesh.run(200.0)
    why = mesh.decision().why
    assert "times a minute now, kept another 1" in why
    assert mesh.nodes() == ("fra-1",)


def test_a_node_that_started_anew_is_told_at_once() -> None:
    mesh = Driver()
    mesh.run(10.0, ask_every=1.0)
    assert [word.is_news for _, word in mesh.words] == [True]
    mesh.view = view_of(TOPOLOGY, fra_1={"incarnation": "2"})
    mesh.run(2.0, ask_every=1.0)
    assert [(word.node, word.is_news) for _, word in mesh.words] == [("fra-1", True)] * 2
