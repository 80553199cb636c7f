"""Distances and estimates: known places, the metric's laws, and complete links."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from topology_text import VALID

from topology.geography import (
    EARTH_RADIUS_KM,
    LIGHT_KM_PER_MS,
    estimate_rtt_ms,
    great_circle_km,
    link_between,
    nearest_sites,
)
from topology.load import parse_topology
from topology.model import Link, LinkDefaults, Position

HALF_WAY_ROUND_KM = math.pi * EARTH_RADIUS_KM
TOLERANCE_KM = 0.001  # near antipodes, rounding of h is worth 0.1 m

positions = st.builds(Position, st.floats(-90, 90), st.floats(-180, 180))


@pytest.mark.parametrize(
    ("a", "b", "km"),
    [
        # A quarter of a great circle, from geometry alone.
        (Position(0, 0), Position(0, 90), HALF_WAY_ROUND_KM / 2),
        (Position(0, 0), Position(90, 12), HALF_WAY_ROUND_KM / 2),
        # One degree of a meridian.
        (Position(10, 20), Position(11, 20), HALF_WAY_ROUND_KM / 180),
        # Across the date line: 0.2 degrees of the equator, not 359.8.
        (Position(0, 179.9), Position(0, -179.9), HALF_WAY_ROUND_KM * 0.2 / 180),
        (Position(5, 180), Position(5, -180), 0.0),
        # All longitudes meet at a pole.
        (Position(90, -100), Position(90, 77), 0.0),
        # Over the pole.
        (Position(80, 0), Position(80, 180), HALF_WAY_ROUND_KM * 20 / 180),
    ],
)
def test_distances_known_from_geometry(a: Position, b: Position, km: float) -> None:
    assert great_circle_km(a, b) == pytest.approx(km, abs=TOLERANCE_KM)


def test_distance_of_two_airports() -> None:
    # Frankfurt to Washington Dulles: about 6,550 km by the airlines' great-circle tables.
    fra, iad = Position(50.0333, 8.5706), Position(38.9445, -77.4558)
    assert great_circle_km(fra, iad) == pytest.approx(6550, rel=0.006)


@given(positions, positions)
def test_distance_is_symmetric_and_bounded(a: Position, b: Position) -> None:
    km = great_circle_km(a, b)
    assert km == great_circle_km(b, a)
    assert 0 <= km <= HALF_WAY_ROUND_KM
    assert great_circle_km(a, a) == 0


@given(positions, positions, positions)
def test_no_detour_is_shorter(a: Position, b: Position, c: Position) -> None:
    assert great_circle_km(a, c) <= great_circle_km(a, b) + great_circle_km(b, c) + TOLERANCE_KM


@given(positions)
def test_antipodes_are_half_way_round(a: Position) -> None:
    antipode = Position(-a.lat, a.lon - 180 if a.lon > 0 else a.lon + 180)
    assert great_circle_km(a, antipode) == pytest.approx(HALF_WAY_ROUND_KM, abs=TOLERANCE_KM)


@given(positions, positions)
def test_distance_and_antipodal_distance_add_up(a: Position, b: Position) -> None:
    antipode = Position(-b.lat, b.lon - 180 if b.lon > 0 else b.lon + 180)
    whole = great_circle_km(a, b) + great_circle_km(a, antipode)
    assert whole == pytest.approx(HALF_WAY_ROUND_KM, abs=TOLERANCE_KM)


@given(positions, positions, st.floats(-360, 360))
def test_turning_the_globe_changes_nothing(a: Position, b: Position, turn: float) -> None:
    def turned(p: Position) -> Position:
        return Position(p.lat, math.remainder(p.lon + turn, 360))

    km = great_circle_km(a, b)
    assert great_circle_km(turned(a), turned(b)) == pytest.approx(km, abs=TOLERANCE_KM)


@given(positions, positions, st.floats(1, 10), st.floats(0, 100))
def test_estimates_are_slower_than_light(
    a: Position, b: Position, detour: float, base_ms: float
) -> None:
    defaults = LinkDefaults(detour=detour, base_rtt_ms=base_ms)
    rtt_ms = estimate_rtt_ms(a, b, defaults)
    assert rtt_ms == estimate_rtt_ms(b, a, defaults)
    assert rtt_ms >= base_ms
    assert rtt_ms >= 2 * great_circle_km(a, b) / LIGHT_KM_PER_MS


def test_estimate_follows_its_formula() -> None:
    # 1,000 km of the equator, detour 2, base 3: 4,000 km at 199.862 km/ms and 3 ms.
    there = Position(0, math.degrees(1000 / EARTH_RADIUS_KM))
    estimate = estimate_rtt_ms(Position(0, 0), there, LinkDefaults(detour=2, base_rtt_ms=3))
    assert estimate == pytest.approx(4000 / 199.8616 + 3, rel=1e-6)


# ---- links -------------------------------------------------------------------------------------


def test_link_inside_a_site_is_local() -> None:
    topology = parse_topology(VALID, "m.yaml")
    assert link_between(topology, "fra", "fra") == Link("fra", "fra", 0.1, 9000.0)


def test_link_says_what_the_file_says_in_both_directions() -> None:
    topology = parse_topology(VALID, "m.yaml")
    assert link_between(topology, "fra", "iad") == Link("fra", "iad", 88.0, 200.0)
    assert link_between(topology, "iad", "fra") == Link("iad", "fra", 88.0, 200.0)


@pytest.mark.parametrize("silent", ["rtt_ms: 88", "bandwidth_mbps: 200", "both"])
def test_silent_links_are_filled(silent: str) -> None:
    start = VALID.index("  - between:")
    end = VALID.index("tenants:")
    text = VALID.replace(f"    {silent}\n", "")
    if silent == "both":
        text = VALID[:start].removesuffix("links:\n") + VALID[end:]
    topology = parse_topology(text, "m.yaml")
    fra, iad = (topology.sites[name].position for name in ("fra", "iad"))
    estimate = estimate_rtt_ms(fra, iad, topology.defaults)
    link = link_between(topology, "fra", "iad")
    assert link.rtt_ms == (88.0 if silent.startswith("bandwidth") else estimate)
    assert link.bandwidth_mbps == (200.0 if silent.startswith("rtt") else 500.0)


def test_a_measured_rtt_of_zero_is_not_silence() -> None:
    topology = parse_topology(VALID.replace("rtt_ms: 88", "rtt_ms: 0"), "m.yaml")
    assert link_between(topology, "fra", "iad").rtt_ms == 0


def test_unknown_sites_have_no_link() -> None:
    topology = parse_topology(VALID, "m.yaml")
    with pytest.raises(KeyError):
        link_between(topology, "fra", "lhr")
    with pytest.raises(KeyError):
        link_between(topology, "lhr", "lhr")


@given(positions)
def test_nearest_sites_are_in_order(here: Position) -> None:
    topology = parse_topology(VALID, "m.yaml")
    (near, near_km), (far, far_km) = nearest_sites(topology, here)
    assert {near.name, far.name} == {"fra", "iad"}
    assert near_km <= far_km
    assert near_km == great_circle_km(here, near.position)
    assume(near_km < far_km)
    assert great_circle_km(here, far.position) > near_km


def test_sites_in_one_place_keep_the_order_of_their_names() -> None:
    text = VALID.replace("lat: 38.95", "lat: 50.03").replace("lon: -77.46", "lon: 8.57")
    topology = parse_topology(text, "m.yaml")
    assert [site.name for site, _ in nearest_sites(topology, Position(1, 1))] == ["fra", "iad"]
