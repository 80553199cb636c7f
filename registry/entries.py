"""What the registry holds, as frozen values.

Owns the vocabulary that the client, the pure machines and their shells share; knows no HTTP and no
Consul.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["passing", "warning", "critical"]


@dataclass(frozen=True, slots=True)
class Registration:
    """One instance of a service, and how long it lives without a heartbeat.

    After ``ttl_s`` seconds without a heartbeat it counts as critical; after ``deregister_after_s``
    seconds of that it is forgotten (servers raise anything below 60 s to 60 s).
    ``meta``: at most 64 pairs, keys of ``[A-Za-z0-9_-]`` up to 128, values up to 512 characters.
    """

    service_id: str
    service: str
    address: str
    port: int
    meta: Mapping[str, str]
    ttl_s: float
    deregister_after_s: float


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """One instance as others see it; ``status`` is the worst of its checks."""

    service_id: str
    service: str
    address: str
    port: int
    meta: Mapping[str, str]
    status: Status


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All instances of one service, ordered by id, as of the registry's ``index``."""

    index: int
    entries: tuple[ServiceEntry, ...]


@dataclass(frozen=True, slots=True)
class KvEntry:
    """One key; ``index`` is the registry's index when it was last written."""

    key: str
    value: bytes
    index: int


@dataclass(frozen=True, slots=True)
class KvSnapshot:
    """All keys under a prefix, ordered by key, as of the registry's ``index``."""

    index: int
    entries: tuple[KvEntry, ...]
