"""Placement under any demand in any mesh: its rules hold, and nothing flaps."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.placement.leases import LEASE_S
from tests.router.placement_driver import GB, A, B, Driver, topology_of, view_of
from tests.router.views import BOTH

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
