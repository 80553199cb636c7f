"""The plan of a mesh: what lies where, what is warm, what does not fit, who gives to whom."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from topology.budget import ENGINE_BYTES, GB, ModelSize
from topology.load import parse_topology
from topology.model import Topology
from topology.planner import MeshPlan, NodePlan, plan_mesh
from topology.reading.key_lines import KeyLines
from topology.rollout import PEERS_AT_ONCE, Paths, spread

SITES = """\
mesh: plan
sites:
  fra: {lat: 50.03, lon: 8.57, region: eu}
  lhr: {lat: 51.47, lon: -0.45, region: eu}
  iad: {lat: 38.95, lon: -77.46, region: na}
links:
  - {between: [fra, lhr], rtt_ms: 10, bandwidth_mbps: 1000}
  - {between: [fra, iad], rtt_ms: 90, bandwidth_mbps: 300}
  - {between: [lhr, iad], rtt_ms: 80, bandwidth_mbps: 500}
models: {a: {}, b: {}, c: {}}
"""

KV_TOKENS = 1000
KV = GB // 10**3  # of one token: a cache takes 1 GB


def sized(disk_gb: float, memory_gb: float) -> ModelSize:
    """A model that takes ``memory_gb`` of a node in all."""
    return ModelSize(round(disk_gb * GB), round(memory_gb * GB) - ENGINE_BYTES - KV * KV_TOKENS, KV)


SIZES = {"a": sized(4, 5), "b": sized(5, 6), "c": sized(2, 3)}


def mesh(nodes: str) -> Topology:
    """Of ``nodes`` (YAML entries), each on a host of its own with ``KV_TOKENS``."""
    lines = [
        line.replace("{", f"{{mesh: '10.0.0.{at}:1', kv_tokens: {KV_TOKENS}, ")
        for at, line in enumerate(nodes.splitlines(), 1)
    ]
    return parse_topology(SITES + "nodes:\n" + "\n".join(lines) + "\n", "mesh.yaml")


def planned(nodes: str) -> MeshPlan:
    return plan_mesh(mesh(nodes), SIZES, {})


def models(node: NodePlan, what: str) -> list[str]:
    return [placed.model for placed in node.models if getattr(placed, what)]


def test_without_bounds_everything_is_warm_and_no_room_is_foretold() -> None:
    plan = planned("  n: {site: fra}")
    (node,) = plan.nodes
    assert models(node, "is_warm") == ["a", "b", "c"]
    assert (node.memory_bytes, node.memory_budget) == (14 * GB, None)
    assert (node.disk_bytes, node.disk_budget) == (11 * GB, None)
    assert [placed.room_tokens for placed in node.models] == [None] * 3
    assert plan.problems == ()


def test_as_many_as_fit_are_warm_in_the_files_order() -> None:
    (node,) = planned("  n: {site: fra, memory_gb: 9}").nodes
    assert models(node, "is_warm") == ["a", "c"]  # b does not fit beside a, c still does
    assert models(node, "is_on_disk") == ["a", "b", "c"]
    assert node.memory_bytes == 8 * GB
    assert [placed.room_tokens for placed in node.models] == [1000, None, 1000]


def test_resident_weights_need_less_room() -> None:
    """One more model fits where weights are kept in 12 bits, if their size so is known."""
    sizes = {
        name: dataclasses.replace(SIZES[name], resident_bytes=SIZES[name].weights_bytes - GB)
        for name in ("a", "c")
    }
    fields = "models: [a, c], memory_gb: 7"
    for form, known, warm in (
        ("plain", sizes, ["a"]),
        ("auto", sizes, ["a"]),  # it may find that plain ones are faster
        ("resident", sizes, ["a", "c"]),
        ("resident", SIZES, ["a"]),
    ):
        text = f"  n: {{site: fra, {fields}, weights: {form}}}"
        (node,) = plan_mesh(mesh(text), known, {}).nodes
        assert models(node, "is_warm") == warm, form


def test_pinned_models_come_first() -> None:
    plan = planned("  n: {site: fra, memory_gb: 9, pinned: [c]}")
    assert models(plan.nodes[0], "is_warm") == ["a", "c"]
    assert models(plan.nodes[0], "is_pinned") == ["c"]
    assert plan.problems == ()  # b fits beside c, at another time than a
    plan = planned("  n: {site: fra, memory_gb: 9, pinned: [b]}")
    assert models(plan.nodes[0], "is_warm") == ["b", "c"]


def test_a_model_that_can_never_be_loaded_is_a_problem() -> None:
    plan = planned("  n: {site: fra, memory_gb: 8, pinned: [c]}")
    (problem,) = plan.problems
    assert problem.keys == ("nodes", "n", "memory_gb")
    assert problem.over_bytes == GB
    assert "'b'" in problem.message
    assert "3.000 GB of pinned" in problem.message
    assert "1.000 GB more" in problem.message


def test_pinned_models_that_do_not_fit_together_are_one_problem() -> None:
    plan = planned("  n: {site: fra, memory_gb: 10.5, pinned: [a, b]}")
    (problem,) = plan.problems
    assert problem.keys == ("nodes", "n", "pinned")
    assert problem.over_bytes == GB // 2
    assert models(plan.nodes[0], "is_warm") == ["a", "c"]


def test_a_disk_that_is_too_small_keeps_what_is_pinned() -> None:
    plan = planned("  n: {site: fra, disk_gb: 8, pinned: [b]}")
    (node,) = plan.nodes
    assert models(node, "is_on_disk") == ["b", "c"]
    assert models(node, "is_warm") == ["b", "c"]
    (problem,) = plan.problems
    assert problem.keys == ("nodes", "n", "disk_gb")
    assert problem.over_bytes == 3 * GB
    assert problem.message.endswith("not on it: a")


def test_a_model_of_unknown_size_is_named_with_the_reason() -> None:
    topology = mesh("  n: {site: fra, memory_gb: 9, disk_gb: 9, models: [a, b]}")
    plan = plan_mesh(topology, {"a": SIZES["a"]}, {"b": "it is damaged"})
    (problem,) = plan.problems  # nobody serves c
    assert problem.keys == ("models", "b")
    assert "it is damaged" in problem.message
    (node,) = plan.nodes
    assert [placed.memory_bytes for placed in node.models] == [5 * GB, None]
    assert models(node, "is_on_disk") == ["a"]


def test_nodes_of_one_host_share_a_store() -> None:
    text = SITES + (
        "nodes:\n"
        "  one: {site: fra, models: [a], disk_gb: 8}\n"
        "  two: {site: fra, models: [b], disk_gb: 20}\n"
    )
    plan = plan_mesh(parse_topology(text, "mesh.yaml"), SIZES, {})
    assert [node.disk_bytes for node in plan.nodes] == [4 * GB, 4 * GB]
    assert [problem.keys for problem in plan.problems] == [("nodes", "one", "disk_gb")]
    assert [fetch.model for fetch in plan.fetches] == ["a"]
    assert plan.nodes[0].models[0].peers == ()


def test_the_second_disk_fetches_from_the_first_and_the_third_from_both() -> None:
    plan = planned(
        "  f: {site: fra, models: [a], give_mbps: 400}\n"
        "  i: {site: iad, models: [a], give_mbps: 400}\n"
        "  l: {site: lhr, models: [a], give_mbps: 600}"
    )
    first, second, third = plan.fetches
    assert (first.node, first.shares, first.seconds) == ("f", (), None)
    assert second.node == "l"
    assert [(share.giver, share.mbps) for share in second.shares] == [("f", 400)]
    assert second.seconds is not None
    assert math.isclose(second.seconds, 0.010 + 4 * 8000 / 400)
    assert third.node == "i"
    assert [(share.giver, share.mbps) for share in third.shares] == [("l", 500), ("f", 300)]
    assert third.seconds is not None
    assert math.isclose(third.seconds, 0.080 + 4 * 8000 / 800)
    assert [share.nbytes for share in third.shares] == [2.5 * GB, 1.5 * GB]
    assert [(use.giver, use.taker, use.nbytes) for use in plan.links] == [
        ("lhr", "iad", 2.5 * GB),
        ("fra", "iad", 1.5 * GB),
        ("fra", "lhr", 4 * GB),
    ]
    assert [placed.peers for node in plan.nodes for placed in node.models] == [
        ("l", "i"),
        ("l", "f"),
        ("f", "i"),
    ]


def test_givers_of_one_site_share_its_link() -> None:
    plan = planned(
        "  f1: {site: fra, models: [a], give_mbps: 400}\n"
        "  f2: {site: fra, models: [a], give_mbps: 200}\n"
        "  i: {site: iad, models: [a]}"
    )
    fetch = plan.fetches[-1]
    assert fetch.node == "i"
    assert [(share.giver, share.mbps) for share in fetch.shares] == [("f1", 200), ("f2", 100)]
    # Inside a site nothing crosses a link between sites.
    assert [(use.giver, use.taker) for use in plan.links] == [("fra", "iad")]


def test_a_problem_is_found_on_its_line() -> None:
    text = SITES + "nodes:\n  n:\n    site: fra\n    disk_gb: 1\n"
    lines = KeyLines(text, "mesh.yaml")
    assert lines.where(("nodes", "n", "disk_gb")) == f"mesh.yaml:{text.count(chr(10))}"
    above = len(SITES.splitlines()) + 2
    assert lines.where(("nodes", "n", "memory_gb")) == f"mesh.yaml:{above}"
    assert lines.where(("nowhere",)) == "mesh.yaml:1"


# ---- properties ----------------------------------------------------------------------------------

NAMES = ["m0", "m1", "m2", "m3", "m4"]


@st.composite
def meshes(draw: st.DrawFn) -> tuple[Topology, dict[str, ModelSize]]:
    """Any nodes with any bounds, and sizes of most of their models."""
    base = mesh("  n: {site: fra}")
    model = base.models["a"]
    template = base.nodes["n"]
    nodes = {}
    for at in range(draw(st.integers(1, 7))):
        listed = tuple(draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1)))
        pinned = draw(st.lists(st.sampled_from(listed), unique=True, max_size=2))
        nodes[f"n{at}"] = dataclasses.replace(
            template,
            name=f"n{at}",
            site=draw(st.sampled_from(["fra", "lhr", "iad"])),
            models=listed,
            pinned=tuple(pinned),
            mesh=dataclasses.replace(template.mesh, host=f"h{draw(st.integers(0, 3))}"),
            memory_gb=draw(st.none() | st.floats(0.1, 50)),
            disk_gb=draw(st.none() | st.floats(0.1, 50)),
            give_mbps=draw(st.floats(1, 5000)),
        )
    size = st.builds(
        ModelSize, st.integers(1, 20 * GB), st.integers(1, 20 * GB), st.integers(0, KV)
    )
    sizes = draw(st.dictionaries(st.sampled_from(NAMES), size))
    whole = dataclasses.replace(
        base, models={name: dataclasses.replace(model, name=name) for name in NAMES}, nodes=nodes
    )
    return whole, sizes


@settings(deadline=None)
@given(meshes())
def test_a_plan_keeps_its_promises(drawn: tuple[Topology, dict[str, ModelSize]]) -> None:
    topology, sizes = drawn
    plan = plan_mesh(topology, sizes, {})
    assert plan == plan_mesh(topology, sizes, {})
    for node in plan.nodes:
        warm, kept = set(models(node, "is_warm")), set(models(node, "is_on_disk"))
        assert warm <= kept <= sizes.keys()
        assert node.memory_budget is None or node.memory_bytes <= node.memory_budget
        assert node.disk_budget is None or node.disk_bytes <= node.disk_budget
        for placed in node.models:
            if placed.is_on_disk and not placed.is_warm:  # it was left out for want of room
                assert node.memory_budget is not None
                assert placed.memory_bytes is not None
                assert placed.memory_bytes > node.memory_budget - node.memory_bytes
            if placed.room_tokens is not None:
                assert node.memory_budget is not None
                extra = placed.room_tokens * sizes[placed.model].kv_bytes_per_token
                assert node.memory_bytes + extra <= node.memory_budget
    fits = all(
        placed.is_on_disk and not (placed.is_pinned and not placed.is_warm)
        for node in plan.nodes
        for placed in node.models
    )
    assert fits or plan.problems  # whatever is missing is told


@settings(deadline=None)
@given(meshes())
def test_every_disk_fetches_once_and_only_from_those_that_have_it(
    drawn: tuple[Topology, dict[str, ModelSize]],
) -> None:
    topology, sizes = drawn
    plan = plan_mesh(topology, sizes, {})
    holders: dict[str, set[str]] = {}
    for fetch in plan.fetches:
        having = holders.setdefault(fetch.model, set())
        givers = [share.giver for share in fetch.shares]
        assert set(givers) <= having
        assert len(givers) == min(len(having), PEERS_AT_ONCE)
        assert fetch.node not in having
        assert bool(having) == (fetch.seconds is not None)
        if fetch.shares:
            assert sum(share.nbytes for share in fetch.shares) == fetch.nbytes
            assert min(share.nbytes for share in fetch.shares) >= 0
            assert [share.rtt_ms for share in fetch.shares] == sorted(
                share.rtt_ms for share in fetch.shares
            )
        having.add(fetch.node)
    crossing = sum(
        share.nbytes
        for fetch in plan.fetches
        for share in fetch.shares
        if share.site != topology.nodes[fetch.node].site
    )
    assert sum(use.nbytes for use in plan.links) == crossing


@given(
    st.integers(0, 10**12),
    st.lists(st.tuples(st.sampled_from(["fra", "lhr", "iad"]), st.floats(1, 5000)), max_size=6),
)
def test_no_link_carries_more_than_it_can(nbytes: int, nodes: list[tuple[str, float]]) -> None:
    base = mesh("  n: {site: fra}")
    disks = [
        dataclasses.replace(base.nodes["n"], name=f"n{at}", site=site, give_mbps=mbps)
        for at, (site, mbps) in enumerate(nodes)
    ]
    paths = Paths(base)
    fetches = spread(paths, "a", nbytes, disks)
    assert sorted(fetch.node for fetch in fetches) == sorted(node.name for node in disks)
    by_name = {node.name: node for node in disks}
    for fetch in fetches:
        for site in {share.site for share in fetch.shares}:
            rate = sum(share.mbps for share in fetch.shares if share.site == site)
            bandwidth = paths.bandwidth_mbps(by_name[fetch.node].site, site)
            assert rate <= bandwidth * (1 + 1e-9)
