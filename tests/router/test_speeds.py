"""Measured speeds, damped: equal nodes are equal, unknown ones usual, different ones different."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.routing.costs import Work
from router.routing.policy import RouteRequest, choose
from router.routing.speeds import (
    DEFAULT_PREFILL_TOKENS_PER_S,
    SAME_SPEED,
    base_step_s,
    damped,
    prefill_rate,
)
from router.routing.view import Speed
from router.routing.view_builder import Reservation, ViewBuilder
from tests.fakes.fake_connection import FakeMesh
from tests.fakes.fake_node import FakeNode, idle_engine
from tests.router.router_mesh import MODEL, make_topology
from wire.messages import CacheDelta, EngineLoad, Load

BOTH = ("prefill", "decode")


def built(engines: dict[str, EngineLoad], hardware: dict[str, str] | None = None) -> ViewBuilder:
    """A router in fra whose nodes have said these loads."""
    topology = make_topology(dict.fromkeys(engines, BOTH))
    nodes = {
        name: replace(node, hardware=(hardware or {}).get(name, ""))
        for name, node in topology.nodes.items()
    }
    builder = ViewBuilder(replace(topology, nodes=nodes), "fra")
    builder.set_directory(dict.fromkeys(engines, False))
    for name, engine in engines.items():
        fake = FakeNode(name, name[:3], FakeMesh(), roles=("prefill", "decode"))
        builder.link_up(name, fake.hello())
        builder.set_load(name, Load([engine], [], False), now=0.0)
    return builder


def nearest(builder: ViewBuilder, tokens: int) -> str:
    view = builder.snapshot()
    asked = RouteRequest(Work(MODEL, tokens, 128, {}), view.position())
    return choose(asked, view, 0.0, random.Random(0)).route.prefill


@pytest.mark.parametrize("noise", [0.7, 0.9, 1.3])
def test_noise_does_not_send_requests_across_an_ocean(noise: float) -> None:
    builder = built(
        {
            "fra-1": idle_engine(MODEL, prefill_tokens_per_s=1000.0 * noise, decode_step_ms=20.0),
            "fra-2": idle_engine(MODEL, prefill_tokens_per_s=1000.0, decode_step_ms=20.0 / noise),
            "iad-1": idle_engine(MODEL, prefill_tokens_per_s=1100.0, decode_step_ms=18.0),
        }
    )
    assert nearest(builder, 4000).startswith("fra")


def test_a_node_that_is_really_faster_is_worth_the_way() -> None:
    builder = built(
        {
            "fra-1": idle_engine(MODEL, prefill_tokens_per_s=1000.0),
            "iad-1": idle_engine(MODEL, prefill_tokens_per_s=5000.0),
        }
    )
    assert nearest(builder, 4000) == "iad-1"


def test_other_hardware_is_no_equal() -> None:
    """Half as fast is a fact where the hardware says so."""
    engines = {
        "fra-1": idle_engine(MODEL, prefill_tokens_per_s=1000.0),
        "iad-1": idle_engine(MODEL, prefill_tokens_per_s=1400.0),
    }
    assert nearest(built(engines), 4000) == "fra-1"
    assert nearest(built(engines, {"iad-1": "better"}), 4000) == "iad-1"


def test_a_fresh_engine_counts_as_its_equals_do() -> None:
    builder = built(
        {
            "fra-1": idle_engine(MODEL, prefill_tokens_per_s=0.0, decode_step_ms=0.0),
            "iad-1": idle_engine(MODEL, prefill_tokens_per_s=50_000.0, decode_step_ms=2.0),
        }
    )
    assert nearest(builder, 4000) == "fra-1"


def test_speeds_follow_loads_and_departures() -> None:
    builder = built({"fra-1": idle_engine(MODEL, prefill_tokens_per_s=700.0)})
    (speed,) = builder.snapshot().speeds.values()
    assert speed.prefill_tokens_per_s == 700.0
    builder.link_down("fra-1")
    assert builder.snapshot().speeds == {}


def test_nothing_known_is_the_default() -> None:
    unknown = idle_engine(MODEL, prefill_tokens_per_s=0.0, decode_step_ms=0.0)
    assert prefill_rate(unknown, Speed()) == DEFAULT_PREFILL_TOKENS_PER_S
    assert base_step_s(unknown, Speed()) > 0


@given(st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_damping_is_steady_keeps_the_order_and_never_overshoots(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert damped(low, 1.0) <= damped(high, 1.0) * (1 + 1e-9)
    for value in (low, high):
        counted = damped(value, 1.0)
        assert min(value, 1.0) * (1 - 1e-9) <= counted <= max(value, 1.0) * (1 + 1e-9)
        if value >= SAME_SPEED**2 or value <= SAME_SPEED**-2:
            assert counted == pytest.approx(value)
        if SAME_SPEED**-0.99 <= value <= SAME_SPEED**0.99:
            assert counted == 1.0
    if high / low < 1.001:  # no jumps
        assert damped(high, 1.0) / damped(low, 1.0) < 1.01


def test_a_new_incarnation_starts_with_nothing_of_the_old() -> None:
    """Digests, load, rates and own reservations go with the process that they were of."""
    builder = built({"fra-1": idle_engine(MODEL)})
    value = bytes(16)
    builder.apply_cache("fra-1", CacheDelta(MODEL, False, [(value, 9)], []))
    builder.reserve("fra-1", 1, Reservation(MODEL, 500, 1, at=0.0))
    builder.set_draining("fra-1")
    fake = FakeNode("fra-1", "fra", FakeMesh(), starts=2)
    builder.link_up("fra-1", fake.hello())
    node = builder.snapshot().nodes["fra-1"]
    assert node.incarnation == "fra-1-2"
    assert (node.engines, node.links, node.pending, node.draining) == ({}, {}, {}, False)
    assert builder.prefixes.cached_tokens(MODEL, [value]) == {}
    assert builder.snapshot().speeds == {}
