"""The sections about geography: sites, links and what silent links get."""

from __future__ import annotations

from topology.model import Link, LinkDefaults, Position, Site
from topology.reading.fields import Fields
from topology.reading.names import Names, check_name
from topology.reading.yaml_nodes import Entry, Items, describe

# Bounds that catch a wrong unit, not a bold operator.
MAX_RTT_MS = 60_000.0  # a minute
MAX_BANDWIDTH_MBPS = 1e7  # 10 Tbit/s
MAX_DETOUR = 100.0

_SITE = ("lat", "lon", "region", "city")
_LINK = ("between", "rtt_ms", "bandwidth_mbps")
_DEFAULTS = ("detour", "base_rtt_ms", "bandwidth_mbps", "local_rtt_ms", "local_bandwidth_mbps")


def read_sites(names: Names) -> dict[str, Site]:
    """All sites; fills in ``names.regions``."""
    sites = {name: _site(name, entry, names) for name, entry in names.sites.items()}
    regions = {site.region for site in sites.values()}
    # Where one is unreadable, any name may be the one that was meant.
    names.regions = () if "" in regions else tuple(sorted(regions))
    return sites


def _site(name: str, entry: Entry, names: Names) -> Site:
    fields = Fields(entry, _SITE, names.problems)
    region = fields.text("region")
    if region and (found := fields.entry("region")):
        check_name(region, found.value.line, names.problems)
    return Site(
        name=name,
        position=Position(fields.number("lat", -90, 90), fields.number("lon", -180, 180)),
        region=region,
        city=fields.text("city", ""),
    )


def read_links(top: Fields, names: Names) -> dict[frozenset[str], Link]:
    """All links, by their two ends."""
    section = top.entry("links")
    if section is None:
        return {}
    if not isinstance(section.value, Items):
        message = f"links must be a list, found {describe(section.value)}"
        names.problems.add(section.line, message, "write - {between: [SITE, SITE], rtt_ms: …}")
        return {}
    links: dict[frozenset[str], Link] = {}
    lines: dict[frozenset[str], int] = {}
    for item in section.value.values:
        fields = Fields(Entry(item.line, item), _LINK, names.problems)
        rtt_ms = fields.number_or_none("rtt_ms", 0, MAX_RTT_MS)
        bandwidth = fields.number_or_none("bandwidth_mbps", 0, MAX_BANDWIDTH_MBPS, above=True)
        ends = _ends(fields, names)
        if ends is None:
            continue
        pair = frozenset(ends)
        if pair in links:
            message = f"a second link between {ends[0]!r} and {ends[1]!r}"
            hint = f"the first is on line {lines[pair]}; a link is the same both ways"
            names.problems.add(item.line, message, hint)
            continue
        links[pair] = Link(*ends, rtt_ms, bandwidth)
        lines[pair] = item.line
    return links


def _ends(fields: Fields, names: Names) -> tuple[str, str] | None:
    ends = fields.texts("between", required=True, distinct=False)
    for end, line in ends or ():
        names.check_site(end, line)
    if ends is None:
        return None
    if len(ends) != 2:
        message = f"a link is between two sites, found {len(ends)}"
        names.problems.add(fields.line, message, "write between: [SITE, SITE]")
        return None
    (a, line), (b, _) = ends
    if a == b:
        hint = "inside a site, defaults.local_rtt_ms and local_bandwidth_mbps count"
        names.problems.add(line, f"a link from {a!r} to itself", hint)
        return None
    return a, b


def read_defaults(top: Fields) -> LinkDefaults:
    """What silent links get; absent values keep the built-in ones."""
    usual = LinkDefaults()
    entry = top.entry("defaults")
    if entry is None:
        return usual
    fields = Fields(entry, _DEFAULTS, top.problems)

    def rtt(key: str, default: float) -> float:
        return fields.number(key, 0, MAX_RTT_MS, default)

    def bandwidth(key: str, default: float) -> float:
        return fields.number(key, 0, MAX_BANDWIDTH_MBPS, default, above=True)

    return LinkDefaults(
        detour=fields.number("detour", 1, MAX_DETOUR, usual.detour),
        base_rtt_ms=rtt("base_rtt_ms", usual.base_rtt_ms),
        bandwidth_mbps=bandwidth("bandwidth_mbps", usual.bandwidth_mbps),
        local_rtt_ms=rtt("local_rtt_ms", usual.local_rtt_ms),
        local_bandwidth_mbps=bandwidth("local_bandwidth_mbps", usual.local_bandwidth_mbps),
    )
