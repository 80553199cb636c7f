"""Who is harmed when: bounds that hold for every seed; victims are told from the healed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popmesh.drill.faults import FAULTS, STAGES, parse_faults
from popmesh.drill.plan import (
    AIM_S,
    Conductor,
    Missing,
    Recovered,
    Refused,
    Settings,
    Stop,
    StreamAt,
    Strike,
    Struck,
    Tick,
)
from popmesh.drill.world import NOTICE_S, RECOVERY_S, LinkSeen, MeshSeen, NodeSeen, RouterSeen
from wire.errors import ConfigError

BOTH = frozenset({"prefill", "decode"})
ROLES = {"p1": {"prefill"}, "p2": {"prefill"}, "d1": {"decode"}, "d2": {"decode"}, "b": BOTH}
KILLS = (FAULTS["kill-agent"], FAULTS["kill-engine"])


def node(name: str, roles: set[str] | frozenset[str]) -> NodeSeen:
    return NodeSeen(name, "ams", frozenset(roles), frozenset({"m"}), "1", True)


def whole_mesh() -> MeshSeen:
    nodes = tuple(node(name, roles) for name, roles in ROLES.items())
    return MeshSeen(nodes, (RouterSeen("r1", 1, True), RouterSeen("r2", 2, True)))


def settings(**changes) -> Settings:
    return replace(Settings(KILLS, 1.0, 1, None, 0.2), **changes)


@dataclass
class World:
    """A mesh in which victims are out for a while, and the conductor's view of it."""

    conductor: Conductor
    out_s: float = 5.0
    now: float = 0.0
    down: dict[str, float] = field(default_factory=dict)
    incarnations: Counter[str] = field(default_factory=Counter)
    strikes: list[Strike] = field(default_factory=list)
    other: list[object] = field(default_factory=list)
    together: list[frozenset[str]] = field(default_factory=list)

    def mesh(self) -> MeshSeen:
        whole = whole_mesh()
        self.down = {name: until for name, until in self.down.items() if until > self.now}
        nodes = tuple(
            replace(n, ready=n.name not in self.down, incarnation=str(self.incarnations[n.name]))
            for n in whole.nodes
        )
        routers = tuple(
            replace(r, ready=r.name not in self.down, start=self.incarnations[r.name])
            for r in whole.routers
        )
        return MeshSeen(nodes, routers)

    def say(self, event) -> None:
        for effect in self.conductor.handle(event, self.now):
            if not isinstance(effect, Strike):
                self.other.append(effect)
                continue
            self.strikes.append(effect)
            victim = effect.order.victim
            self.down[victim] = self.now + self.out_s
            self.incarnations[victim] += effect.order.fault.name != "kill-engine"
            self.together.append(frozenset(self.down))
            self.say(Struck(effect.order.number))

    def run(self, until: float, step: float = 0.25) -> None:
        while self.now < until and not self.conductor.done:
            self.now += step
            self.say(self.mesh())


def world(seed: int = 1, out_s: float = 5.0, **changes) -> World:
    return World(Conductor(settings(**changes), random.Random(seed), 0.0), out_s)


@given(seed=st.integers(0, 10**6), max_down=st.integers(1, 4), out_s=st.floats(0.3, 9.0))
def test_the_bounds_hold_whatever_the_seed(seed, max_down, out_s):
    w = world(seed, out_s, max_down=max_down, kills=12)
    w.run(1000.0)
    assert len(w.strikes) == 12
    for down in w.together:
        assert len(down) <= max_down
        left = [roles for name, roles in ROLES.items() if name not in down]
        assert all(any(role in roles for roles in left) for role in BOTH)
    assert [effect for effect in w.other if isinstance(effect, Missing)] == []
    assert len(w.other) == 12, "everybody has recovered"


def test_the_same_seed_does_the_same_harm():
    runs = []
    for _ in range(2):
        w = world(7, kills=8)
        w.run(500.0)
        runs.append(w.strikes)
    assert runs[0] == runs[1]
    other = world(8, kills=8)
    other.run(500.0)
    assert other.strikes != runs[0]


def test_kinds_and_victims_come_equally_often():
    w = world(3, kills=40)
    w.run(3000.0)
    kinds = Counter(s.order.fault.name for s in w.strikes)
    victims = Counter(s.order.victim for s in w.strikes)
    assert kinds == {"kill-agent": 20, "kill-engine": 20}
    assert victims == dict.fromkeys(ROLES, 8)


def test_nodes_that_take_no_part_are_spared_even_where_a_stream_aims_at_them():
    w = world(4, kills=12, spared=frozenset({"p1", "d2"}))
    while len(w.strikes) < 12:
        for stage in STAGES:
            w.say(StreamAt(stage, ("p1", "d2")))
        w.run(w.now + 1.0)
    assert {strike.order.victim for strike in w.strikes} == ROLES.keys() - {"p1", "d2"}


def test_a_stream_at_the_stage_names_the_victim():
    stages: Counter[str] = Counter()
    for seed in range(30):
        w = world(seed)
        while w.conductor._aim is None:
            w.now += 0.05
            w.say(w.mesh())
        wanted = w.conductor._aim.stage
        for stage in STAGES:
            w.say(StreamAt(stage, () if stage == "before-first-token" else ("d2",)))
        if wanted == "before-first-token":  # not before a random moment on the way to it
            w.now += 0.2
            w.say(Tick())
            assert w.strikes[0].order.victim in ("p1", "p2", "b")
        else:
            assert w.strikes[0].order.victim == "d2"
        assert w.strikes[0].order.stage == wanted
        stages[wanted] += 1
    assert len(stages) == 3


def test_without_a_stream_somebody_is_struck_all_the_same():
    w = world(5)
    w.say(w.mesh())
    while not w.strikes:
        at = w.conductor.next_deadline()
        assert at is not None
        assert at <= 1.5 + AIM_S
        w.now = at
        w.say(Tick())
    assert w.strikes[0].order.stage == "any"


def test_nobody_is_harmed_in_a_mesh_that_is_not_whole():
    w = world(1)
    w.down["d1"] = 60.0
    w.run(59.0)
    assert w.strikes == []
    w.run(70.0)
    assert w.strikes


def test_the_last_of_a_role_is_spared():
    w = world(2, max_down=5, kills=30, out_s=0.6)
    w.down["p2"] = w.down["b"] = 10_000.0
    w.run(400.0)
    assert {s.order.victim for s in w.strikes} == {"d1", "d2"}


def test_the_last_router_is_spared():
    w = world(1, faults=(FAULTS["kill-router"],), kills=6)
    w.down["r1"] = 50.0
    w.run(49.0)
    assert w.strikes == []
    w.run(300.0)
    assert {s.order.victim for s in w.strikes} == {"r1", "r2"}
    assert len([e for e in w.other if isinstance(e, Recovered)]) == 6


def test_routers_are_harmed_as_often_as_nodes_also_while_one_of_those_is_out():
    """Who knows an answer may be gone altogether then."""
    faults = (*KILLS, FAULTS["kill-router"])
    w = world(1, faults=faults, max_down=2, kills=60)
    w.run(3000.0)
    kinds = Counter(s.order.fault.name for s in w.strikes)
    assert min(kinds.values()) >= 15, kinds
    routers = {"r1", "r2"}
    assert any(len(together) == 2 and together & routers for together in w.together)
    assert not any(together >= routers for together in w.together)
    assert max(map(len, w.together)) == 2


def test_a_link_counts_for_every_node_behind_it():
    links = (LinkSeen("ams~fra", frozenset({"d1", "d2"})), LinkSeen("ams~lhr", frozenset({"b"})))
    w = world(1, faults=(FAULTS["partition"],), links=links, kills=3)
    w.run(200.0)
    assert {s.order.victim for s in w.strikes} == {"ams~lhr"}


def test_an_engine_that_nobody_missed_is_reported():
    w = world(1, out_s=0.0, faults=(FAULTS["kill-engine"],))
    w.run(200.0)
    assert len(w.strikes) == 1, "a mesh that does not heal is left in peace"
    (missing,) = w.other
    assert isinstance(missing, Missing)
    assert "noticed" in missing.reason
    assert NOTICE_S <= w.now < 200.0
    assert w.conductor.done


def test_a_victim_that_stays_away_ends_the_harm():
    w = world(1, out_s=10_000.0, faults=(FAULTS["kill-agent"],))
    w.run(2 * RECOVERY_S)
    (missing,) = w.other
    assert isinstance(missing, Missing)
    assert w.conductor.done
    assert RECOVERY_S <= w.now < RECOVERY_S + 10


def test_an_agent_with_its_old_incarnation_has_not_been_killed_yet():
    w = world(1, out_s=3.0, faults=(FAULTS["kill-agent"],), kills=1)
    while not w.strikes:
        w.now += 0.25
        w.say(w.mesh())
    victim = w.strikes[0].order.victim
    w.incarnations[victim] -= 1
    w.run(w.now + 20)
    assert w.other == []
    w.incarnations[victim] += 1
    w.run(w.now + 1)
    assert isinstance(w.other[0], Recovered)


def test_a_freeze_lasts_its_time_however_soon_the_mesh_is_whole():
    w = world(1, out_s=0.0, faults=(FAULTS["freeze-agent"],), kills=1)
    w.run(200.0)
    (recovered,) = w.other
    assert isinstance(recovered, Recovered)
    assert recovered.after_s >= FAULTS["freeze-agent"].duration_s


def test_a_refused_order_harms_nobody_and_does_not_count():
    conductor = Conductor(settings(kills=1), random.Random(1), 0.0)
    now, orders = 0.0, []
    while len(orders) < 3:
        now += 0.25
        for effect in conductor.handle(whole_mesh(), now):
            assert isinstance(effect, Strike)
            orders.append(effect.order)
            conductor.handle(Refused(effect.order.number), now)
    assert not conductor.done
    assert [order.number for order in orders] == [1, 2, 3]


def test_stop_ends_the_aiming_but_waits_for_the_victim():
    w = world(1)
    while not w.strikes:
        w.now += 0.25
        w.say(w.mesh())
    w.say(Stop())
    assert not w.conductor.done
    w.run(100.0)
    assert w.conductor.done
    assert len(w.strikes) == 1


def test_faults_by_name():
    assert parse_faults("kill-agent, one-way,kill-agent") == (
        FAULTS["kill-agent"],
        FAULTS["one-way"],
    )
    with pytest.raises(ConfigError, match=r"'boom'.*kill-engine"):
        parse_faults("kill-agent,boom")
    with pytest.raises(ConfigError, match="no fault is named"):
        parse_faults(" ,")
