"""What a plan says is warm when the doors open is what the node's own machine loads."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from pop_node.residency import events as ev
from pop_node.residency.residency import Residency
from topology.budget import GB, ModelSize, memory_budget
from topology.load import parse_topology
from topology.planner import plan_mesh

TEXT = "mesh: m\nmodels: {a: {}, b: {}, c: {}, d: {}}\n"
TEXT += "sites: {fra: {lat: 50, lon: 8, region: eu}}\nnodes: {n: {site: fra, kv_tokens: 1000}}\n"
NAMES = ["a", "b", "c", "d"]
SIZE = st.builds(ModelSize, st.just(1), st.integers(1, 4 * GB), st.integers(0, GB // 1000))


@given(
    st.permutations(NAMES),
    st.lists(st.sampled_from(NAMES), unique=True),
    st.fixed_dictionaries(dict.fromkeys(NAMES, SIZE)),
    st.none() | st.floats(0.1, 12),
)
def test_a_node_loads_what_the_plan_says(
    models: list[str], pinned: list[str], sizes: dict[str, ModelSize], memory_gb: float | None
) -> None:
    mesh = parse_topology(TEXT, "mesh.yaml")
    node = dataclasses.replace(
        mesh.nodes["n"], models=tuple(models), pinned=tuple(pinned), memory_gb=memory_gb
    )
    plan = plan_mesh(dataclasses.replace(mesh, nodes={"n": node}), sizes, {})
    residency = Residency(
        node.models, pinned=node.pinned, fetchable=(), budget_bytes=memory_budget(node)
    )
    for name, size in sizes.items():
        needs = size.memory_bytes(node)
        assert residency.handle(ev.Fetched(name, needs, size.disk_bytes), 0.0) == []
    effects = residency.handle(ev.Started(), 0.0)
    loaded = {effect.model for effect in effects if isinstance(effect, ev.Load)}
    assert {placed.model for placed in plan.nodes[0].models if placed.is_warm} == loaded
    refused = {name for name in NAMES if residency.why_refused(name, 0.0)}
    if not any(problem.keys[-1] == "pinned" for problem in plan.problems):
        never = {problem.message.split("'")[1] for problem in plan.problems}
        assert never <= refused
