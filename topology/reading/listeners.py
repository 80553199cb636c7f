"""Addresses in a topology file: how they are spelt, and that no two processes claim one."""

from __future__ import annotations

import ipaddress
import re

from topology.model import Address
from topology.reading.fields import Fields
from topology.reading.problems import Problems
from topology.reading.yaml_nodes import shorten
from wire.address import parse_address
from wire.errors import ConfigError

ANY_LOOPBACK = Address("127.0.0.1", 0)

_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*")
_EVERYWHERE = ("0.0.0.0", "::")


def read_address(fields: Fields, key: str) -> Address:
    """``HOST:PORT`` under ``key``; any free loopback port when absent."""
    text = fields.text_or_none(key)
    found = fields.entry(key)
    if text is None or found is None:
        return ANY_LOOPBACK
    line = found.value.line
    try:
        host, port = parse_address(text)
    except (ConfigError, ValueError):  # ValueError: thousands of digits
        host, _, port_text = text.rpartition(":")
        if host and port_text.isascii() and port_text.isdigit():
            fields.problems.add(line, f"{key} {shorten(text)!r}: a port is at most 65535")
        else:
            fields.problems.add(line, f"{key} {shorten(text)!r} is no address", "write HOST:PORT")
        return ANY_LOOPBACK
    if ":" in host:
        if not _is_ipv6(host) or not text.startswith("["):
            hint = "write [ADDRESS]:PORT for IPv6, without a scheme"
            fields.problems.add(line, f"{key} {shorten(text)!r} is no address", hint)
            return ANY_LOOPBACK
    elif not _HOST.fullmatch(host):
        fields.problems.add(line, f"{key} {shorten(text)!r} names no host", "write HOST:PORT")
        return ANY_LOOPBACK
    return Address(host, port)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


class Listeners:
    """Who claims which address."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._claims: dict[tuple[str, str, int], tuple[str, int]] = {}

    def claim(self, owner: str, key: str, address: Address, fields: Fields) -> None:
        """Note an address that another process, or the owner's other listener, claims already.

        Port 0 never collides. A wildcard host says nothing about the machine, so it collides only
        within one owner.
        """
        if address.port == 0:
            return
        entry = fields.entry(key)
        line = entry.value.line if entry else fields.line
        scope = owner if address.host in _EVERYWHERE else ""
        where = (scope, address.host.lower(), address.port)
        if where in self._claims:
            other, other_line = self._claims[where]
            message = f"{owner} {key} and {other} (line {other_line}) both listen on {address}"
            self._problems.add(line, message, "give one of them another port")
        else:
            self._claims[where] = (f"{owner} {key}", line)


def check_network(text: str, line: int, problems: Problems) -> None:
    """Note what is not an IPv4 or IPv6 network such as 10.0.0.0/8."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        try:
            meant = str(ipaddress.ip_network(text, strict=False))
        except ValueError:
            hint = "write ADDRESS/BITS, e.g. 10.0.0.0/8"
            problems.add(line, f"{shorten(text)!r} is no network", hint)
        else:
            message = f"{text!r} has bits set beyond its mask"
            problems.add(line, message, f"did you mean {meant}?")
