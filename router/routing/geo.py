"""Where a client is: an edge header from a trusted network, a GeoIP database, or the router itself.

Not knowing is a value here (``source="router"``), never an exception; only a trusted edge that
sends nonsense is told so. Knows no HTTP framework: callers pass the peer's address and the header's
text.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import maxminddb

from topology.model import Position
from wire.errors import ConfigError, RequestError

GEO_HEADER = "x-popmesh-client-geo"

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class ClientPlace:
    """A client's position and how it was found; ``ignored_header`` marks an untrusted claim."""

    position: Position
    source: Literal["header", "mmdb", "router"]
    ignored_header: bool = False


class ClientLocator:
    """Places clients. ``home`` is the router's own position."""

    def __init__(self, home: Position, trusted_networks: Iterable[str], mmdb: Path | None) -> None:
        """Raises ``ConfigError`` when the database cannot be read."""
        self._home = home
        self._trusted: list[IpNetwork] = [ipaddress.ip_network(n) for n in trusted_networks]
        self._database: maxminddb.Reader | None = None
        if mmdb is not None:
            try:
                self._database = maxminddb.open_database(str(mmdb))
            except (OSError, ValueError, maxminddb.InvalidDatabaseError) as exc:
                raise ConfigError(
                    f"cannot read the GeoIP database: {exc}", where=str(mmdb)
                ) from exc

    def close(self) -> None:
        """Release the database file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def trusts(self, peer: str) -> bool:
        """True when ``peer`` (an IP address as text) lies in a trusted network."""
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._trusted)

    def place(self, peer: str, header: str | None) -> ClientPlace:
        """Position of a client; raises ``RequestError`` for a bad header from a trusted peer."""
        if header is not None and self.trusts(peer):
            return ClientPlace(parse_position(header), "header")
        ignored = header is not None
        found = self._look_up(peer)
        if found is not None:
            return ClientPlace(found, "mmdb", ignored)
        return ClientPlace(self._home, "router", ignored)

    def _look_up(self, peer: str) -> Position | None:
        if self._database is None:
            return None
        try:
            record = self._database.get(peer)
        except (ValueError, maxminddb.InvalidDatabaseError):  # not an address, or a torn record
            return None
        location = record.get("location") if isinstance(record, dict) else None
        if not isinstance(location, dict):
            return None
        lat, lon = location.get("latitude"), location.get("longitude")
        if isinstance(lat, (int, float)) and isinstance(lon, (int, float)):
            return Position(float(lat), float(lon))
        return None


def parse_position(text: str) -> Position:
    """``LAT,LON`` in degrees -> ``Position``; raises ``RequestError``."""
    parts = text.split(",")
    try:
        lat, lon = (float(part) for part in parts)
    except ValueError:
        lat = lon = math.nan
    if not (abs(lat) <= 90 and abs(lon) <= 180):  # false for NaN as well
        raise RequestError(
            f"{GEO_HEADER} must be LAT,LON in degrees, e.g. 48.35,11.79; got {text[:80]!r}",
            code="invalid_value",
            param=GEO_HEADER,
        )
    return Position(lat, lon)
