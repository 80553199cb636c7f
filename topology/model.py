"""What an operator's topology file says, as frozen values.

Owns the types and the look-ups that follow from them alone. Reading and checking YAML is
``topology.load``; distances are ``topology.geography``. Knows no registry, router or node code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Role = Literal["prefill", "decode"]
Device = Literal["cpu", "cuda"]
Dtype = Literal["bfloat16", "float32"]
Backend = Literal["auto", "reference", "native", "triton"]
WeightForm = Literal["plain", "resident", "auto"]

TRUSTED_BY_DEFAULT = ("127.0.0.0/8", "::1/128")

BYTES_PER_MBIT = 1e6 / 8
"""Bytes of a megabit: turns an ``_mbps`` of a topology, 10^6 bits a second, into bytes a second."""

GIVE_MBPS = 400.0
"""Guess: 40 % of a 1 Gbit/s port, so that answers and KV streams keep the larger part."""

DETECTION_S = 5.0
"""Guess: five missed pings; shorter times blame a host that is merely busy."""


@dataclass(frozen=True, slots=True)
class Position:
    """A point on Earth in degrees: latitude -90..90, longitude -180..180."""

    lat: float
    lon: float


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process listens. Port 0 means "any free port" (the launcher fills it in)."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Model:
    """A served model. ``source`` is what ``popmesh model add`` reads; ``digest`` pins its identity.

    ``regions`` limits where it may run (empty: anywhere). ``context_tokens`` caps the model's own.
    """

    name: str
    source: str | None = None
    digest: str | None = None
    dtype: Dtype = "bfloat16"
    context_tokens: int | None = None
    regions: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Site:
    """One PoP: an IATA-style name, a position, and the region that residency rules speak of."""

    name: str
    position: Position
    region: str
    city: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """One agent at a site. ``mesh`` is its listener for routers, ``kv`` the one for KV streams.

    ``threads`` of each engine; None: all cores, shared by the engines of the node, or with
    ``popmesh up`` by all (``topology.cores``), and one where the work is a device's.
    ``batch_invariant`` asks its engines for the same bits in any batch. ``weights`` says
    how matrices lie in their memory; "auto": as was measured (``popmesh model tune``), else plain.
    ``models`` may be more than fit ``memory_gb`` (10^9 bytes, for weights and KV caches; None: all
    are kept in memory): then ``pinned`` ones stay and the others come and go. ``disk_gb`` bounds
    its store (None: the disk does). ``bundles`` is its listener for nodes that fetch models from
    it, which together get at most ``give_mbps``.
    """

    name: str
    site: str
    roles: frozenset[Role]
    models: tuple[str, ...]
    mesh: Address
    kv: Address
    device: Device = "cpu"
    hardware: str = ""
    store: Path | None = None
    threads: int | None = None
    backend: Backend = "auto"
    kv_tokens: int = 16384
    batch_invariant: bool = False
    weights: WeightForm = "auto"
    memory_gb: float | None = None
    pinned: tuple[str, ...] = ()
    disk_gb: float | None = None
    bundles: Address = Address("127.0.0.1", 0)
    give_mbps: float = GIVE_MBPS


@dataclass(frozen=True, slots=True)
class Router:
    """One router process at a site."""

    name: str
    site: str
    listen: Address


@dataclass(frozen=True, slots=True)
class Link:
    """A path between two sites, the same both ways. None means "estimate"."""

    a: str
    b: str
    rtt_ms: float | None = None
    bandwidth_mbps: float | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who may ask. Keys are stored as hex SHA-256; ``regions`` limits where its prompts may go."""

    name: str
    key_sha256: tuple[str, ...]
    regions: frozenset[str] = frozenset()
    operator: bool = False


@dataclass(frozen=True, slots=True)
class LinkDefaults:
    """What a silent link gets: RTT = great circle at 2/3 c, times ``detour``, + ``base_rtt_ms``."""

    detour: float = 1.6
    base_rtt_ms: float = 2.0
    bandwidth_mbps: float = 1000.0
    local_rtt_ms: float = 0.2
    local_bandwidth_mbps: float = 10000.0


@dataclass(frozen=True, slots=True)
class Placement:
    """When models follow demand. A region that asks for a model at least ``warm_per_min`` times a
    minute gets it into memory on one of its nodes, where it stays ``cool_after_s`` beyond the time
    that the region asked so often. ``warm_per_min`` 0: models come only when a request needs one.
    """

    warm_per_min: float = 2.0
    cool_after_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Topology:
    """A whole mesh. Maps are by name and keep the file's order.

    ``detection_s``: a router gives up a node that says nothing for so long, an agent its engine.
    """

    mesh: str
    models: dict[str, Model]
    sites: dict[str, Site]
    nodes: dict[str, Node]
    routers: dict[str, Router]
    links: dict[frozenset[str], Link] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    trusted_networks: tuple[str, ...] = TRUSTED_BY_DEFAULT
    defaults: LinkDefaults = LinkDefaults()
    detection_s: float = DETECTION_S
    placement: Placement = Placement()
    source: str = field(default="", compare=False)  # where it was read; no part of the mesh
