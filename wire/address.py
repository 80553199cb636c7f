"""Addresses as text, and the one place where a dialled address may be replaced.

A process that emulates a WAN on one machine is given a map from real addresses to the local ports
of a link shaper; everything else dials through ``Dialer`` without knowing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from wire.errors import ConfigError


def parse_address(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` -> (host, port); raises ``ConfigError``."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{text!r} is not an address", suggestion="write HOST:PORT")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """(host, port) -> ``host:port``, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@lru_cache(maxsize=4096)  # asked for every request; parsing costs more than the rest of a check
def is_loopback(host: str) -> bool:
    """True for localhost and loopback addresses; names that need a resolver count as remote."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Dialer:
    """Resolves the address to really connect to."""

    replaced: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, address: str) -> tuple[str, int]:
        """Host and port to connect to instead of ``address``."""
        return parse_address(self.replaced.get(address, address))
