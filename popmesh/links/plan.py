"""The shaper's plan file: which ports it listens on, where each leads, and how each link behaves.

The launcher writes it; the shaper reads it at start and again on SIGHUP, when only the links'
figures may have changed. ``listen`` and ``target`` are ``host:port``; both directions of a port
belong to the unordered pair of sites ``(from_site, to_site)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from wire.address import parse_address
from wire.errors import ConfigError

T = TypeVar("T")


class EmulatedLink(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pair of sites, the same both ways. ``bandwidth_mbps`` holds for each direction alone."""

    a: str
    b: str
    rtt_ms: float
    bandwidth_mbps: float

    @property
    def pair(self) -> frozenset[str]:
        """The two sites, without order."""
        return frozenset((self.a, self.b))

    @property
    def rate_bytes_per_s(self) -> float:
        """One direction's rate in bytes/s."""
        return self.bandwidth_mbps * 1e6 / 8

    @property
    def one_way_s(self) -> float:
        """Propagation delay of one direction in seconds."""
        return self.rtt_ms / 2e3


class ShapedPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A local port that stands for ``target`` as seen from ``from_site``."""

    listen: str
    target: str
    from_site: str
    to_site: str


class LinkPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a shaper process does."""

    links: list[EmulatedLink]
    ports: list[ShapedPort]

    def by_pair(self) -> dict[frozenset[str], EmulatedLink]:
        """The links by their unordered pair of sites."""
        return {link.pair: link for link in self.links}

    def dial_map(self, from_site: str) -> dict[str, str]:
        """What a process at ``from_site`` dials instead of a real address (a link map file)."""
        return {p.target: p.listen for p in self.ports if p.from_site == from_site}


class LinkMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A link map file: real address -> address to dial instead."""

    replaced: dict[str, str]


def read_link_plan(path: Path) -> LinkPlan:
    """Load and check a plan file; raises ``ConfigError``."""
    plan = _decode(path, LinkPlan)
    known = plan.by_pair()
    for link in plan.links:
        if link.bandwidth_mbps <= 0 or link.rtt_ms < 0:
            raise ConfigError(
                f"link {link.a}-{link.b}: {link.bandwidth_mbps} Mbit/s, {link.rtt_ms} ms",
                where=str(path),
                suggestion="bandwidth_mbps must be above 0 and rtt_ms not below 0",
            )
    for port in plan.ports:
        parse_address(port.listen)
        parse_address(port.target)
        if frozenset((port.from_site, port.to_site)) not in known:
            raise ConfigError(
                f"port {port.listen} uses the link {port.from_site}-{port.to_site}",
                where=str(path),
                suggestion="list that link under links",
            )
    return plan


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


def _decode(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as exc:
        raise ConfigError(f"cannot read it: {exc.strerror}", where=str(path)) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(str(exc), where=str(path)) from exc
