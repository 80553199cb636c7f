"""Models on demand and placement, closed loop: what clients get, and how often models are moved."""

from __future__ import annotations

import pytest

from router.placement.leases import LEASE_S
from router.placement.machine import YIELD_S
from tests.sim.models_world import LEAVE_S, LOAD_S, Asking, World
from topology.model import Placement

RULES = Placement(warm_per_min=2.0, cool_after_s=120.0)
SEEDS = range(4)


def loads_since(world: World, at: float) -> list[tuple[float, str, str]]:
    """(When, node, model) of loads from then on."""
    return sorted(
        (when, host.name, model)
        for host in world.hosts.values()
        for when, model in host.loads
        if when >= at
    )


def since(world: World, at: float, model: str) -> list[Asking]:
    return [asking for asking in world.asked if asking.at >= at and asking.model == model]


@pytest.mark.parametrize("seed", SEEDS)
def test_steady_demand_is_met_near_it_without_waiting_and_nothing_moves(seed: int) -> None:
    world = World(seed, "abc", RULES)
    for site, model in (("fra", "a"), ("iad", "b"), ("syd", "c")):
        world.demand(site, model, 12.0, 700.0)
    world.run(120.0)
    settled = world.now
    world.run(580.0)
    for model, nodes in (("a", {"fra-1", "lhr-1"}), ("b", {"iad-1"}), ("c", {"syd-1"})):
        asked = since(world, settled, model)
        assert len(asked) > 80
        assert {asking.node for asking in asked} <= nodes
        assert all(asking.begun_at == asking.at for asking in asked)
    assert loads_since(world, settled) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_demand_that_moves_takes_its_model_along(seed: int) -> None:
    world = World(seed, "ab", RULES)
    world.demand("iad", "a", 20.0, 300.0)
    world.run(300.0)
    world.demand("syd", "b", 20.0, 900.0)
    world.run(60.0)
    moved = world.now
    world.run(540.0)
    assert {asking.node for asking in since(world, moved, "b")} == {"syd-1"}
    assert all(asking.begun_at == asking.at for asking in since(world, moved, "b"))
    assert loads_since(world, moved) == []


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [10, 100])
def test_a_burst_for_a_cold_model_loads_it_once(seed: int, count: int) -> None:
    world = World(seed, "abcd", RULES)
    world.run(10.0)
    begun = world.now
    burst = [world.ask("fra", "d") for _ in range(count)]
    world.run(30.0)
    assert len(loads_since(world, begun)) == 1
    assert not [asking for asking in burst if asking.refused]
    assert max(asking.wait_s for asking in burst) <= LEAVE_S + LOAD_S + 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_asked_for_rarely_comes_though_all_memory_is_leased(seed: int) -> None:
    """Four models in steady demand fill the four nodes; a fifth client tries again and again."""
    world = World(seed, "abcde", RULES)
    for site, model in (("fra", "a"), ("lhr", "b"), ("iad", "c"), ("syd", "d")):
        world.demand(site, model, 15.0, 2000.0)
    world.run(300.0)
    first = world.now
    while not (asking := world.ask("fra", "e")).node or asking.refused:
        assert asking.retry_after_s > 0
        assert world.now - first < LEASE_S + YIELD_S
        world.run(10.0)
    world.run(10.0)
    assert asking.begun_at is not None
    world.run(2 * YIELD_S)  # and then everything goes on as before
    settled = world.now
    world.run(300.0)
    assert loads_since(world, settled) == []
    for model in "abcd":
        asked = since(world, settled, model)
        assert not [asking for asking in asked if asking.refused or asking.begun_at != asking.at]


@pytest.mark.parametrize("seed", SEEDS)
def test_models_that_fight_for_one_memory_do_not_take_turns_all_the_time(seed: int) -> None:
    """Six in like demand on four nodes: everybody is answered or told when to come back, and no
    node loads much more often than leases end."""
    world = World(seed, "abcdef", RULES)
    for number, model in enumerate("abcdef"):
        world.demand(("fra", "lhr", "iad", "syd")[number % 4], model, 6.0, 900.0)
    world.run(950.0)
    for host in world.hosts.values():
        assert len(host.loads) <= 950.0 / LEASE_S * 2
    for asking in world.asked:
        assert asking.begun_at is not None or asking.retry_after_s > 0
    answered = [asking for asking in world.asked if asking.begun_at is not None]
    assert len(answered) > len(world.asked) / 2
    for model in "abcdef":
        assert [asking for asking in answered if asking.model == model]


def test_no_model_is_loaded_for_a_request_that_cannot_wait() -> None:
    world = World(0, "abcd", RULES)
    world.run(10.0)
    asking = world.ask("fra", "d", deadline_s=1.0)
    assert "too late for this request" in asking.refused
    assert asking.retry_after_s >= LOAD_S
    assert loads_since(world, 10.0) == []
