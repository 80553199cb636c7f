"""Placement: models follow demand, within memory and residency, without flapping."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.placement.demand import MEMORY_S, Demand, DemandSites
from router.placement.leases import LEASE_S, RESAY
from router.placement.machine import LOOK_S, MISSING_S, YIELD_S, PlacementMachine
from router.placement.words import Asked, Decision, Looked, SayWarm
from router.routing.speeds import typical_speeds
from router.routing.view import NodeView, View
from tests.fakes.fake_node import idle_engine
from tests.router.router_mesh import make_topology
from tests.router.test_policy import BOTH, FRA, IAD, SYD, offer
from topology.model import Model, Placement, Topology

GB = 10**9
A, B = "alpha", "beta"
RULES = Placement(warm_per_min=2.0, cool_after_s=300.0)


def topology_of(
    roles: dict[str, tuple[str, ...]], rules: Placement = RULES, **pinned: tuple[str, ...]
) -> Topology:
    """Every node may serve both models within 4 GB; each takes 3 GB."""
    made = make_topology(roles)
    nodes = {
        name: replace(
            node, models=(A, B), memory_gb=4.0, pinned=pinned.get(name.replace("-", "_"), ())
        )
        for name, node in made.nodes.items()
    }
    return replace(made, nodes=nodes, models={A: Model(A), B: Model(B)}, placement=rules)


TOPOLOGY = topology_of({"fra-1": BOTH, "lhr-1": BOTH, "iad-1": BOTH, "syd-1": BOTH})


def view_of(topology: Topology, **changes: dict[str, Any]) -> View:
    """All nodes up with both models on their disks, but for ``changes``; ``alpha`` and ``beta`` in
    them change the engines."""
    nodes: dict[str, NodeView] = {}
    for name, node in topology.nodes.items():
        changed = dict(changes.get(name.replace("-", "_"), {}))
        engines = {}
        for model in (A, B):
            engine = {"ready": False, "warmth": "disk", "eta_ms": 2000, "memory_bytes": 3 * GB}
            engine |= changed.pop(model, {})
            engine["ready"] = engine["warmth"] == "warm"
            engines[model] = idle_engine(model, **engine)
        site = topology.sites[node.site]
        used = sum(e.memory_bytes for e in engines.values() if e.warmth in ("warm", "loading"))
        known = NodeView(
            name=name,
            site=node.site,
            region=site.region,
            position=site.position,
            roles=node.roles,
            phase="up",
            draining=False,
            incarnation="1",
            version=3,
            kin="cpu",
            rtt_ms=1.0,
            rtt_measured=True,
            load_at=0.0,
            offers={model: offer(name=model) for model in (A, B)},
            engines=engines,
            links={},
            pending={},
            memory_bytes=4 * GB,
            memory_used_bytes=used,
        )
        nodes[name] = replace(known, **changed)
    return View(topology, "fra", nodes, {}, typical_speeds(nodes.values()))


class Driver:
    """A placement machine with a clock; ``words`` are all it said, with the time."""

    def __init__(self, topology: Topology = TOPOLOGY) -> None:
        self.machine = PlacementMachine(topology)
        self.topology = topology
        self.view = view_of(topology)
        self.now = 0.0
        self.words: list[tuple[float, SayWarm]] = []

    def ask(self, model: str = A, site: str = "fra", times: int = 1, tokens: int = 10) -> None:
        for _ in range(times):
            assert self.machine.handle(Asked(model, site, tokens, tokens), self.now) == []

    def look(self) -> list[SayWarm]:
        words = self.machine.handle(Looked(self.view), self.now)
        self.words += [(self.now, word) for word in words]
        return words

    def run(self, seconds: float, ask_every: float = math.inf, **asked: Any) -> list[SayWarm]:
        """Let time pass, looking when the machine wants to."""
        said: list[SayWarm] = []
        end = self.now + seconds
        next_ask = math.inf if ask_every == math.inf else self.now
        while True:
            due = self.machine.next_deadline()
            at = min(end, next_ask, math.inf if due is None else due)
            if at >= end:
                self.now = end
                return said
            self.now = max(self.now, at)
            if self.now >= next_ask:
                self.ask(**asked)
                next_ask += ask_every
                due = self.machine.next_deadline()
            if due is not None and due <= self.now:
                said += self.look()

    def decision(self, model: str = A, region: str = "eu") -> Decision:
        return next(d for d in self.machine.decisions if (d.model, d.region) == (model, region))

    def nodes(self, model: str = A, region: str = "eu") -> tuple[str, ...]:
        return self.decision(model, region).nodes


# ---- demand ------------------------------------------------------------------------------------


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


# ---- where -------------------------------------------------------------------------------------


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


# ---- whatever happens --------------------------------------------------------------------------


WARMTHS = st.sampled_from(["warm", "loading", "disk", "fetching", "absent"])
STATES = st.fixed_dictionaries(
    {},
    optional={
        A: st.fixed_dictionaries({"warmth": WARMTHS, "warm_refused": st.sampled_from(["", "no"])}),
        B: st.fixed_dictionaries({"warmth": WARMTHS, "memory_bytes": st.integers(0, 5 * GB)}),
        "phase": st.sampled_from(["up", "connecting"]),
        "draining": st.booleans(),
        "incarnation": st.sampled_from(["1", "2"]),
        "version": st.sampled_from([2, 3]),
    },
)
MIXED = topology_of(
    {"fra-1": BOTH, "fra-2": ("prefill",), "lhr-1": ("decode",), "lhr-2": BOTH, "iad-1": BOTH},
    lhr_2=(B,),
)


class Whatever(RuleBasedStateMachine):
    """Any demand, any mesh: the rules hold after each look."""

    @initialize()
    def begin(self) -> None:
        self.mesh = Driver(MIXED)
        self.last: dict[tuple[str, str], float] = {}  # until, by model and node

    @rule(
        model=st.sampled_from([A, B]),
        site=st.sampled_from(["fra", "lhr", "iad"]),
        times=st.integers(1, 30),
        tokens=st.integers(1, 3000),
    )
    def asked(self, model: str, site: str, times: int, tokens: int) -> None:
        self.mesh.ask(model, site, times, tokens)

    @rule(states=st.fixed_dictionaries(dict.fromkeys(MIXED.nodes, STATES)))
    def changed(self, states: dict[str, Any]) -> None:
        self.mesh.view = view_of(
            MIXED, **{name.replace("-", "_"): state for name, state in states.items()}
        )

    @rule(seconds=st.floats(0.1, 400.0))
    def passed(self, seconds: float) -> None:
        self.mesh.now += seconds
        self._look()

    @rule()
    def _look(self) -> None:
        mesh = self.mesh
        for word in mesh.look():
            node = mesh.view.nodes[word.node]
            engine = node.engines[word.message.model]
            assert (node.phase, node.draining, node.version) == ("up", False, 3)
            assert not engine.warm_refused
            assert word.message.model not in MIXED.nodes[word.node].pinned
            assert 0 < word.message.hold_ms <= LEASE_S * 1e3
            (decision,) = [
                d
                for d in mesh.machine.decisions
                if d.model == word.message.model and word.node in d.nodes
            ]
            assert decision.region == node.region
        for name, node in mesh.view.nodes.items():
            pinned = MIXED.nodes[name].pinned
            models = {d.model for d in mesh.machine.decisions if name in d.nodes}
            kept = [node.engines[model].memory_bytes for model in models.union(pinned)]
            # What is pinned may be more than fits; then nothing else is kept there.
            assert node.phase != "up" or models <= {*pinned} or sum(kept) <= node.memory_bytes

    @invariant()
    def silence_ends_it(self) -> None:
        if not self.mesh.machine.decisions and self.mesh.machine.next_deadline() is None:
            assert list(self.mesh.machine._demand) == []


TestWhatever = Whatever.TestCase
TestWhatever.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.floats(0.0, 90.0), min_size=1, max_size=40),
    sites=st.lists(st.sampled_from(["fra", "lhr"]), min_size=40, max_size=40),
)
def test_in_a_quiet_mesh_a_region_never_changes_its_node(
    gaps: list[float], sites: list[str]
) -> None:
    """As long as there is a place for the model, it is the same one."""
    mesh, chosen = Driver(), set()
    for gap, site in zip(gaps, sites, strict=False):
        mesh.ask(site=site)
        mesh.run(gap)
        nodes = [d.nodes for d in mesh.machine.decisions if d.nodes]
        chosen = chosen | set(nodes) if nodes else set()
        assert len(chosen) <= 1
