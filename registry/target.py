"""Where a registry is: its URL, taken apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

from wire.errors import ConfigError

DEFAULT_PORT = 8500
"""Consul's HTTP port. Source: Consul documentation, required ports."""


@dataclass(frozen=True, slots=True)
class Target:
    """A registry's address, the datacenter to read from and the token to show."""

    host: str
    port: int
    dc: str | None
    token: str | None = field(repr=False)


def parse_url(url: str) -> Target:
    """``consul://HOST[:PORT][?dc=..&token=..]`` or ``http://`` -> its parts.

    Raises ``ConfigError``, which never repeats the token.
    """
    suggestion = "write consul://HOST:PORT[?dc=NAME&token=TOKEN]"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as exc:
        raise ConfigError(f"the registry's URL is malformed: {exc}", suggestion=suggestion) from exc
    options = dict(query)
    if parts.scheme not in ("consul", "http") or not host or parts.path not in ("", "/"):
        shown = url.partition("?")[0]
        raise ConfigError(f"{shown!r} is not a registry's URL", suggestion=suggestion)
    unknown = options.keys() - {"dc", "token"}
    if unknown or len(options) != len(query) or not all(options.values()):
        keys = sorted(name for name, _ in query)
        raise ConfigError(f"impossible options in a registry's URL: {keys}", suggestion=suggestion)
    return Target(
        host=f"[{host}]" if ":" in host else host,
        port=DEFAULT_PORT if port is None else port,
        dc=options.get("dc"),
        token=options.get("token"),
    )
