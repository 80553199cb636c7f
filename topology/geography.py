"""Distances on Earth and what they cost: great circles, round trips, and links that are complete.

Pure arithmetic over ``topology.model``; knows no file and no network.
"""

from __future__ import annotations

import math

from topology.model import Link, LinkDefaults, Position, Site, Topology

EARTH_RADIUS_KM = 6371.0088  # mean radius R1 of the WGS 84 ellipsoid (IUGG)
LIGHT_KM_PER_MS = 299.792458  # vacuum, by definition of the metre
FIBRE_KM_PER_MS = LIGHT_KM_PER_MS * 2 / 3  # a refractive index of 1.5, rounded up from 1.468


def great_circle_km(a: Position, b: Position) -> float:
    """Length in km of the shortest way over a spherical Earth, 0 to about 20,015.

    With phi latitudes and lambda longitudes in radians (the haversine formula, exact to a
    millimetre for near points; within 0.6 % of the ellipsoid):

        h = sin²((phi_b - phi_a) / 2) + cos phi_a · cos phi_b · sin²((lambda_b - lambda_a) / 2)
        d = 2 R asin √h
    """
    lat_a, lat_b = math.radians(a.lat), math.radians(b.lat)
    half_lat = (lat_b - lat_a) / 2
    half_lon = math.radians(b.lon - a.lon) / 2
    h = math.sin(half_lat) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin(half_lon) ** 2
    return 2 * EARTH_RADIUS_KM * math.asin(math.sqrt(min(1.0, h)))  # rounding may pass 1


def estimate_rtt_ms(a: Position, b: Position, defaults: LinkDefaults) -> float:
    """Round trip in ms between two points of which nothing is measured.

        rtt_ms = 2 · km · detour / (2/3 · 299.79 km/ms) + base_rtt_ms

    ``detour`` is how much longer cables are than the great circle, ``base_rtt_ms`` what routers and
    the last mile add. Tells 15 from 90 ms, not 15 from 18.
    """
    km = great_circle_km(a, b)
    return 2 * km * defaults.detour / FIBRE_KM_PER_MS + defaults.base_rtt_ms


def link_between(topology: Topology, a: str, b: str) -> Link:
    """The path between sites ``a`` and ``b``, with RTT and bandwidth never None.

    Inside one site the local defaults hold; what the file does not say about a link is estimated.
    Raises ``KeyError`` for a site that the topology does not have.
    """
    site_a, site_b = topology.sites[a], topology.sites[b]
    defaults = topology.defaults
    if a == b:
        return Link(a, b, defaults.local_rtt_ms, defaults.local_bandwidth_mbps)
    given = topology.links.get(frozenset((a, b)), Link(a, b))
    rtt_ms, bandwidth_mbps = given.rtt_ms, given.bandwidth_mbps
    if rtt_ms is None:
        rtt_ms = estimate_rtt_ms(site_a.position, site_b.position, defaults)
    if bandwidth_mbps is None:
        bandwidth_mbps = defaults.bandwidth_mbps
    return Link(a, b, rtt_ms, bandwidth_mbps)


def nearest_sites(topology: Topology, position: Position) -> list[tuple[Site, float]]:
    """All sites with their great-circle distance in km from ``position``, nearest first.

    Sites at the same distance keep the order of their names.
    """
    distances = [
        (site, great_circle_km(position, site.position)) for site in topology.sites.values()
    ]
    return sorted(distances, key=lambda found: (found[1], found[0].name))
