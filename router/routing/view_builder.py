"""Keeps the newest facts about nodes and hands out snapshots of them.

Synchronous and clock-free: facts come in with their time. A change rebuilds only the node it
concerns, so a snapshot per request stays cheap in a mesh of hundreds of nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from router.routing.prefix_index import PrefixIndex
from router.routing.speeds import typical_speeds
from router.routing.view import NodeView, Pending, View
from topology.geography import link_between
from topology.model import Node, Topology
from wire.messages import (
    MAX_VERSION,
    CacheDelta,
    EngineLoad,
    Giving,
    Hello,
    LinkRate,
    Load,
    ModelOffer,
)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Work of one leg, counted until the engine's own figures contain it."""

    model: str
    prefill_tokens: int
    streams: int
    at: float


@dataclass(slots=True)
class _Facts:
    node: Node
    drained: bool = False
    draining: bool = False
    hello: Hello | None = None
    rtt_ms: float | None = None
    load: Load | None = None
    load_at: float = 0.0
    reservations: dict[int, Reservation] = field(default_factory=dict)
    wanted: dict[str, float] = field(default_factory=dict)  # models asked for since the last Load

    def forget_sent(self) -> None:
        """Nothing that was sent counts any more."""
        self.reservations.clear()
        self.wanted.clear()


class ViewBuilder:
    """Facts in, ``View`` out. Nodes that the topology does not name are not accepted."""

    def __init__(self, topology: Topology, router_site: str) -> None:
        self._topology = topology
        self._site = router_site
        self._facts: dict[str, _Facts] = {}
        self._views: dict[str, NodeView] = {}
        self._dirty: set[str] = set()
        self._offers_changed = False
        self._loads_changed = False
        self._view = View(topology, router_site, {}, {}, {})
        self.prefixes = PrefixIndex()

    # ---- facts --------------------------------------------------------------------------------

    def set_directory(self, drained: dict[str, bool]) -> None:
        """Nodes that the directory names now, with their drain flags."""
        for name in [name for name in self._facts if name not in drained]:
            del self._facts[name]
            self._views.pop(name, None)
            self.prefixes.forget(name)
            self._offers_changed = True
        for name, flag in drained.items():
            facts = self._facts.get(name)
            if facts is None:
                facts = self._facts[name] = _Facts(self._topology.nodes[name])
            facts.drained = flag
            self._dirty.add(name)

    def link_up(self, name: str, hello: Hello) -> None:
        """A link to ``name`` is open and greeted; what was known of an older process is void."""

        def change(facts: _Facts) -> None:
            facts.hello, facts.load, facts.draining = hello, None, False
            facts.forget_sent()

        self._change(name, change)
        self.prefixes.forget(name)
        self._offers_changed = True

    def link_down(self, name: str) -> None:
        """The link to ``name`` is gone."""

        def change(facts: _Facts) -> None:
            facts.hello, facts.load = None, None
            facts.forget_sent()

        self._change(name, change)
        self.prefixes.forget(name)
        self._offers_changed = True

    def set_rtt(self, name: str, rtt_ms: float) -> None:
        """Measured round trip router <-> node."""
        self._change(name, lambda facts: setattr(facts, "rtt_ms", rtt_ms))

    def set_load(self, name: str, load: Load, now: float) -> None:
        """A ``Load`` push; own reservations that it must already contain are dropped."""

        def change(facts: _Facts) -> None:
            facts.load, facts.load_at, facts.draining = load, now, load.draining
            # Sent at s, a leg reaches the node at s + rtt/2; this Load left it at now - rtt/2.
            horizon = now - (facts.rtt_ms or 0.0) / 1e3
            for key in [k for k, r in facts.reservations.items() if r.at <= horizon]:
                del facts.reservations[key]
            facts.wanted = {model: at for model, at in facts.wanted.items() if at > horizon}

        self._change(name, change)
        self._loads_changed = True

    def set_offers(self, name: str, models: list[ModelOffer]) -> None:
        """The node serves other models than it said before, or elsewhere."""

        def change(facts: _Facts) -> None:
            if facts.hello is not None:
                facts.hello = msgspec.structs.replace(facts.hello, models=models)

        self._change(name, change)
        self._offers_changed = True

    def set_wanted(self, name: str, model: str, now: float) -> None:
        """The node was asked to have a model in memory."""

        def change(facts: _Facts) -> None:
            facts.wanted.setdefault(model, now)

        self._change(name, change)

    def set_draining(self, name: str) -> None:
        """The node said that it takes no new work."""
        self._change(name, lambda facts: setattr(facts, "draining", True))

    def apply_cache(self, name: str, delta: CacheDelta) -> None:
        """A change of the node's prefix cache."""
        if name in self._facts:
            self.prefixes.apply(name, delta)

    def reserve(self, name: str, stream: int, reservation: Reservation) -> None:
        """Count work just sent to ``name``."""
        self._change(name, lambda facts: facts.reservations.__setitem__(stream, reservation))

    def release(self, name: str, stream: int) -> None:
        """The leg is over, and so is what was reserved for it, if no ``Load`` contains it yet."""
        facts = self._facts.get(name)
        if facts is not None and facts.reservations.pop(stream, None) is not None:
            self._dirty.add(name)

    def reservations(self) -> int:
        """Reservations held now, over all nodes (for tests and metrics)."""
        return sum(len(facts.reservations) for facts in self._facts.values())

    # ---- snapshots ----------------------------------------------------------------------------

    def snapshot(self) -> View:
        """The newest view; the same object as long as nothing changed."""
        if not self._dirty and not self._offers_changed:
            return self._view
        for name in self._dirty:
            facts = self._facts.get(name)
            if facts is not None:
                self._views[name] = self._node_view(facts)
        self._dirty.clear()
        nodes = dict(self._views)
        offered = self._view.offered
        if self._offers_changed:
            offered = _offered(nodes)
        speeds = self._view.speeds
        if self._offers_changed or self._loads_changed:
            speeds = typical_speeds(nodes.values())
        self._offers_changed = self._loads_changed = False
        self._view = replace(self._view, nodes=nodes, offered=offered, speeds=speeds)
        return self._view

    def _change(self, name: str, change: Callable[[_Facts], None]) -> None:
        facts = self._facts.get(name)
        if facts is not None:
            change(facts)
            self._dirty.add(name)

    def _node_view(self, facts: _Facts) -> NodeView:
        node, hello = facts.node, facts.hello
        site = self._topology.sites[node.site]
        estimate = link_between(self._topology, self._site, node.site).rtt_ms
        offers: dict[str, ModelOffer] = {}
        engines: dict[str, EngineLoad] = {}
        links: dict[str, LinkRate] = {}
        if hello is not None:
            offers = {offer.name: offer for offer in hello.models}
        if facts.load is not None:
            engines = {engine.model: engine for engine in facts.load.engines}
            links = {link.peer: link for link in facts.load.links}
        return NodeView(
            name=node.name,
            site=node.site,
            region=site.region,
            position=site.position,
            roles=node.roles if hello is None else node.roles & frozenset(hello.roles),
            phase="connecting" if hello is None else "up",
            draining=facts.drained or facts.draining,
            incarnation="" if hello is None else hello.incarnation,
            version=0 if hello is None else min(MAX_VERSION, hello.max_version),
            kin=f"{node.device}/{node.hardware}/{node.threads}",
            rtt_ms=(estimate or 0.0) if facts.rtt_ms is None else facts.rtt_ms,
            rtt_measured=facts.rtt_ms is not None,
            load_at=facts.load_at,
            offers=offers,
            engines=engines,
            links=links,
            pending=_sum_by_model(facts),
            memory_bytes=0 if facts.load is None else facts.load.memory_bytes,
            memory_used_bytes=0 if facts.load is None else facts.load.memory_used_bytes,
            giving=Giving() if facts.load is None else facts.load.giving,
        )


def _sum_by_model(facts: _Facts) -> dict[str, Pending]:
    totals = {model: Pending(wanted_at=at) for model, at in facts.wanted.items()}
    for item in facts.reservations.values():
        held = totals.get(item.model, Pending())
        totals[item.model] = Pending(
            held.prefill_tokens + item.prefill_tokens,
            held.streams + item.streams,
            item.at if held.wanted_at is None else min(held.wanted_at, item.at),
        )
    return totals


def _offered(nodes: dict[str, NodeView]) -> dict[str, tuple[str, ...]]:
    offered: dict[str, list[str]] = {}
    for name, node in nodes.items():
        for model in node.offers:
            offered.setdefault(model, []).append(name)
    return {model: tuple(names) for model, names in offered.items()}
