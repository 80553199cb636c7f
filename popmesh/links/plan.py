"""The shaper's plan file: which ports it listens on, where each leads, and how each link behaves.

The launcher writes it; the shaper reads it at start and again when it is told to (SIGHUP, or
``popmesh.links.control``), when only figures, faults and cuts may have changed. ``listen`` and
``target`` are ``host:port``; both directions of a port belong to the unordered pair of sites
``(from_site, to_site)``. ``links`` says what each pair is like, ``faults`` what is wrong with one
direction just now: a link heals when its faults are taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from topology.model import BYTES_PER_MBIT
from wire.address import parse_address
from wire.errors import ConfigError

T = TypeVar("T")

MAX_LOSS = 0.5
"""Share of packets lost beyond which TCP moves nothing worth emulating: then say ``down``."""


class EmulatedLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A pair of sites, the same both ways. ``bandwidth_mbps`` holds for each direction alone.

    ``cuts`` counts: raised by one, every open connection of the pair is reset once.
    """

    a: str
    b: str
    rtt_ms: float
    bandwidth_mbps: float
    cuts: int = 0

    @property
    def pair(self) -> frozenset[str]:
        """The two sites, without order."""
        return frozenset((self.a, self.b))


class LinkFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is wrong with one direction of a link; None: that figure is the link's own.

    ``down``: nothing gets through, and nobody is told. ``loss``: share of packets, 0 to
    ``MAX_LOSS``, each of which stalls its connection (``popmesh.links.weather``).
    """

    from_site: str
    to_site: str
    down: bool = False
    bandwidth_mbps: float | None = None
    one_way_ms: float | None = None
    jitter_ms: float = 0.0
    loss: float = 0.0


class ShapedPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A local port that stands for ``target`` as seen from ``from_site``."""

    listen: str
    target: str
    from_site: str
    to_site: str


@dataclass(frozen=True, slots=True)
class Figures:
    """One direction as it behaves now: bytes/s, seconds, shares. ``rtt_s`` is that of the pair."""

    rate_bytes_per_s: float
    one_way_s: float
    rtt_s: float
    jitter_s: float
    loss: float
    down: bool


class LinkPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything a shaper process does. ``faults`` has at most one per direction."""

    links: list[EmulatedLink]
    ports: list[ShapedPort]
    faults: list[LinkFault] = []

    def by_pair(self) -> dict[frozenset[str], EmulatedLink]:
        """The links by their unordered pair of sites."""
        return {link.pair: link for link in self.links}

    def directions(self) -> list[tuple[str, str]]:
        """Every ``(from_site, to_site)``, both ways of each link."""
        return [way for link in self.links for way in ((link.a, link.b), (link.b, link.a))]

    def figures(self, from_site: str, to_site: str) -> Figures:
        """The direction's figures with its faults; raises ``KeyError`` for an unknown pair."""
        link = self.by_pair()[frozenset((from_site, to_site))]
        fault = self._fault(from_site, to_site)
        one_way_s = self._one_way_s(link, fault)
        mbps = link.bandwidth_mbps if fault.bandwidth_mbps is None else fault.bandwidth_mbps
        return Figures(
            rate_bytes_per_s=mbps * BYTES_PER_MBIT,
            one_way_s=one_way_s,
            rtt_s=one_way_s + self._one_way_s(link, self._fault(to_site, from_site)),
            jitter_s=fault.jitter_ms / 1e3,
            loss=fault.loss,
            down=fault.down,
        )

    def dial_map(self, from_site: str) -> dict[str, str]:
        """What a process at ``from_site`` dials instead of a real address (a link map file)."""
        return {p.target: p.listen for p in self.ports if p.from_site == from_site}

    def _fault(self, from_site: str, to_site: str) -> LinkFault:
        for fault in self.faults:
            if (fault.from_site, fault.to_site) == (from_site, to_site):
                return fault
        return LinkFault(from_site, to_site)

    @staticmethod
    def _one_way_s(link: EmulatedLink, fault: LinkFault) -> float:
        return (link.rtt_ms / 2 if fault.one_way_ms is None else fault.one_way_ms) / 1e3


class LinkMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A link map file: real address -> address to dial instead."""

    replaced: dict[str, str]


def read_link_plan(path: Path) -> LinkPlan:
    """Load and check a plan file; raises ``ConfigError``."""
    plan = _decode(path, LinkPlan)
    check_link_plan(plan, str(path))
    return plan


def check_link_plan(plan: LinkPlan, where: str) -> None:
    """Raises ``ConfigError`` for what no shaper can do; ``where`` names the plan in its text."""
    known = plan.by_pair()
    for link in plan.links:
        if not (link.bandwidth_mbps > 0 and link.rtt_ms >= 0 and link.cuts >= 0):
            raise ConfigError(
                f"link {link.a}-{link.b}: {link.bandwidth_mbps} Mbit/s, {link.rtt_ms} ms, "
                f"{link.cuts} cuts",
                where=where,
                suggestion="bandwidth_mbps must be above 0, rtt_ms and cuts not below 0",
            )
    for port in plan.ports:
        parse_address(port.listen)
        parse_address(port.target)
        if frozenset((port.from_site, port.to_site)) not in known:
            raise ConfigError(
                f"port {port.listen} uses the link {port.from_site}-{port.to_site}",
                where=where,
                suggestion="list that link under links",
            )
    seen: set[tuple[str, str]] = set()
    for fault in plan.faults:
        _check_fault(fault, seen, known, where)


def _check_fault(
    fault: LinkFault,
    seen: set[tuple[str, str]],
    known: dict[frozenset[str], EmulatedLink],
    where: str,
) -> None:
    way = (fault.from_site, fault.to_site)
    text = f"fault {fault.from_site} to {fault.to_site}"
    if frozenset(way) not in known:
        pairs = ", ".join(sorted(f"{link.a}-{link.b}" for link in known.values()))
        raise ConfigError(f"{text}: no such link", where=where, suggestion=f"links: {pairs}")
    if way in seen:
        raise ConfigError(f"{text} is listed twice", where=where)
    seen.add(way)
    possible = (
        (fault.bandwidth_mbps is None or fault.bandwidth_mbps > 0)
        and (fault.one_way_ms is None or fault.one_way_ms >= 0)
        and fault.jitter_ms >= 0
        and 0 <= fault.loss <= MAX_LOSS
    )
    if not possible:
        raise ConfigError(
            f"{text}: an impossible figure",
            where=where,
            suggestion="bandwidth_mbps above 0, one_way_ms and jitter_ms not below 0, "
            f"loss from 0 to {MAX_LOSS}; for a dead link say down",
        )


def read_link_map(path: Path) -> dict[str, str]:
    """Load a link map file for ``wire.address.Dialer``; raises ``ConfigError``."""
    replaced = _decode(path, LinkMap).replaced
    for pair in replaced.items():
        for address in pair:
            parse_address(address)
    return replaced


def write_json(path: Path, value: LinkPlan | LinkMap) -> None:
    """Write a plan or map file by atomic rename, so that a re-read never sees half of it."""
    temporary = path.with_suffix(path.suffix + ".new")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1))
    temporary.replace(path)


_NAMES: dict[type, str] = {
    LinkPlan: "plan of links ('shaper.plan' in the ready file of 'popmesh up' names one)",
    LinkMap: "link map",
}


def _decode(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as exc:
        raise ConfigError(f"cannot read it: {exc.strerror}", where=str(path)) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"this is no {_NAMES[kind]}: {exc}", where=str(path)) from exc
