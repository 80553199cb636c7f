"""What the router knows about the mesh at one moment, as a frozen snapshot.

``ViewBuilder`` (``view_builder``) makes these; ``policy`` reads them. Pure data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from topology.model import Position, Topology
from wire.messages import EngineLoad, Giving, LinkRate, ModelOffer, Role

LinkPhase = Literal["connecting", "up"]


@dataclass(frozen=True, slots=True)
class Pending:
    """Work this router sent to one engine that the engine's last ``Load`` cannot contain yet.

    ``wanted_at``: when it first asked for the model, on its clock in seconds; None: it did not. A
    node that did not have it in memory loads it since.
    """

    prefill_tokens: int = 0
    streams: int = 0
    wanted_at: float | None = None


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node. ``rtt_ms`` is router <-> node, measured when ``rtt_measured``, else estimated.

    ``load_at`` is the router's clock at the last ``Load`` (seconds). Maps are by model name, except
    ``links``, by peer node. ``kin`` names what computes alike: nodes of one kin are expected to be
    equally fast. ``version`` of the mesh wire is 0 without a link. ``memory_bytes`` is the budget
    for models, 0 without one, ``memory_used_bytes`` what models take of it; ``giving`` is what
    other nodes take of its bundles.
    """

    name: str
    site: str
    region: str
    position: Position
    roles: frozenset[Role]
    phase: LinkPhase
    draining: bool
    incarnation: str
    version: int
    kin: str
    rtt_ms: float
    rtt_measured: bool
    load_at: float
    offers: Mapping[str, ModelOffer]
    engines: Mapping[str, EngineLoad]
    links: Mapping[str, LinkRate]
    pending: Mapping[str, Pending]
    memory_bytes: int = 0
    memory_used_bytes: int = 0
    giving: Giving = field(default_factory=Giving)

    def offers_another(self, model: str, topology: Topology) -> bool:
        """The model that the node offers by this name is not the one that the topology pins."""
        offer, configured = self.offers.get(model), topology.models.get(model)
        pinned = None if configured is None else configured.digest
        return offer is not None and pinned not in (None, offer.identity)


@dataclass(frozen=True, slots=True)
class Speed:
    """Median speed of the measured engines of one kin: prompt tokens per second, and seconds of a
    decode step with no other sequence (``router.routing.costs``). 0: none has measured itself."""

    prefill_tokens_per_s: float = 0.0
    base_step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class View:
    """All nodes of the topology that the directory names, and the router's own place.

    ``speeds`` is by model and kin.
    """

    topology: Topology
    router_site: str
    nodes: Mapping[str, NodeView]
    offered: Mapping[str, tuple[str, ...]]
    speeds: Mapping[tuple[str, str], Speed]

    def position(self) -> Position:
        """Where this router is."""
        return self.topology.sites[self.router_site].position
