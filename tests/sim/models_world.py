"""Nodes whose models come and go, and one router, under a virtual clock: both sides' real machines.

Simulated: time, loads that take ``LOAD_S``, answers that take ``ANSWER_S``. Real: residency on the
nodes, and on the router the view, the choice of routes, and placement. Messages take no time;
loads are pushed once a second and when a model changes its state, as agents do.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pop_node.residency import events as ev
from pop_node.residency.residency import Residency
from router.placement.demand import DemandSites
from router.placement.machine import PlacementMachine
from router.placement.words import Asked, Looked
from router.routing.costs import Work
from router.routing.policy import Pin, RouteRequest, choose
from router.routing.view_builder import Reservation, ViewBuilder
from topology.model import Address, Model, Node, Placement, Position, Router, Site, Topology
from wire.errors import OverloadError
from wire.messages import EngineLoad, Hello, Load, ModelOffer, Warmth

LOAD_S, LEAVE_S, ANSWER_S = 3.0, 0.3, 0.5
GB = 10**9
PLACES = {
    "fra": (Position(50.03, 8.57), "eu"),
    "lhr": (Position(51.47, -0.45), "eu"),
    "iad": (Position(38.95, -77.46), "na"),
    "syd": (Position(-33.95, 151.18), "ap"),
}


def topology_of(models: str, rules: Placement) -> Topology:
    """A node at each site with room for one model of 3 GB; all have all models on their disks."""
    nothing = Address("127.0.0.1", 0)
    return Topology(
        mesh="sim",
        models={name: Model(name) for name in models},
        sites={name: Site(name, *place) for name, place in PLACES.items()},
        nodes={
            f"{site}-1": Node(
                f"{site}-1",
                site,
                frozenset(("prefill", "decode")),
                tuple(models),
                nothing,
                nothing,
                memory_gb=4.0,
            )
            for site in PLACES
        },
        routers={"router-1": Router("router-1", "fra", nothing)},
        placement=rules,
    )


@dataclass(slots=True)
class Asking:
    """One request and what became of it."""

    model: str
    site: str
    at: float
    node: str = ""
    begun_at: float | None = None
    refused: str = ""
    retry_after_s: float = 0.0

    @property
    def wait_s(self) -> float:
        """Until its answer began."""
        assert self.begun_at is not None
        return self.begun_at - self.at


@dataclass(slots=True)
class SimHost:
    """A node: its residency, and the requests that wait or are answered there."""

    name: str
    machine: Residency
    waiting: list[tuple[int, Asking]] = field(default_factory=list)
    legs: dict[str, int] = field(default_factory=dict)
    loads: list[tuple[float, str]] = field(default_factory=list)


class World:
    """``asked`` are all requests, in order."""

    def __init__(self, seed: int, models: str, rules: Placement) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.asked: list[Asking] = []
        self.topology = topology_of(models, rules)
        self.builder = ViewBuilder(self.topology, "fra")
        self.placement = PlacementMachine(self.topology)
        self.sites = DemandSites(self.topology)
        self.hosts: dict[str, SimHost] = {}
        self._streams = itertools.count()
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.builder.set_directory(dict.fromkeys(self.topology.nodes, False))
        for name, node in self.topology.nodes.items():
            host = self.hosts[name] = SimHost(name, Residency(models, budget_bytes=4 * GB))
            for model in models:
                host.machine.handle(ev.Fetched(model, 3 * GB, 3 * GB), 0.0)
            self.builder.link_up(name, _hello(node))
            self._tell(host, ev.Started())
            self._push(host)
        self._look()

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            self.now, _, call = heapq.heappop(self._due)
            call()
        self.now = end

    def demand(self, site: str, model: str, per_min: float, until: float) -> None:
        """Requests at random times from now on."""
        pause_s = self.rng.expovariate(per_min / 60)
        if self.now + pause_s < until:
            self._in(pause_s, lambda: self._again(site, model, per_min, until))

    def _again(self, site: str, model: str, per_min: float, until: float) -> None:
        self.ask(site, model)
        self.demand(site, model, per_min, until)

    def ask(self, site: str, model: str, deadline_s: float = 600.0) -> Asking:
        """One request now."""
        asking = Asking(model, site, self.now)
        self.asked.append(asking)
        client = self.topology.sites[site].position
        near = self.sites.site_of(client, model, frozenset())
        assert near == site
        self.placement.handle(Asked(model, near, 50, 50), self.now)
        request = RouteRequest(Work(model, 50, 50, {}), client, deadline=self.now + deadline_s)
        view = self.builder.snapshot()
        try:
            route = choose(request, view, self.now, self.rng).route
            if route.prefill != route.decode:  # hand-overs are not simulated
                there = replace(request, pin=Pin(route.decode, route.decode))
                route = choose(there, view, self.now, self.rng).route
        except OverloadError as error:
            asking.refused, asking.retry_after_s = error.message, error.retry_after_s or 0.0
            return asking
        asking.node, stream = route.decode, next(self._streams)
        self.builder.reserve(asking.node, stream, Reservation(model, 50, 1, self.now))
        host = self.hosts[asking.node]
        if host.machine.state(model).memory == "warm":
            self._begin(host, asking, stream)
        else:
            host.waiting.append((stream, asking))
            self._tell(host, ev.Wanted(model, self.now + deadline_s))
        return asking

    # ---- a node --------------------------------------------------------------------------------

    def _begin(self, host: SimHost, asking: Asking, stream: int) -> None:
        asking.begun_at = self.now
        self.builder.release(host.name, stream)
        self._legs(host, asking.model, 1)
        self._in(ANSWER_S, lambda: self._legs(host, asking.model, -1))

    def _legs(self, host: SimHost, model: str, more: int) -> None:
        host.legs[model] = host.legs.get(model, 0) + more
        self._tell(host, ev.Legs(model, host.legs[model]))

    def _tell(self, host: SimHost, event: ev.Event) -> None:
        """Give the node's machine an event and carry out what it decides."""
        before = self._warmths(host)
        for effect in host.machine.handle(event, self.now):
            match effect:
                case ev.Load(model):
                    host.loads.append((self.now, model))
                    self._in(LOAD_S, lambda model=model: self._ready(host, model))  # type: ignore[misc]
                case ev.Unload(model):
                    assert not host.legs.get(model), "a model with legs was thrown out"
                    left = ev.Left(model)
                    self._in(LEAVE_S, lambda left=left: self._tell(host, left))  # type: ignore[misc]
                case ev.Refuse(model, why, retry_after_s):
                    for stream, asking in [w for w in host.waiting if w[1].model == model]:
                        host.waiting.remove((stream, asking))
                        asking.refused, asking.retry_after_s = why, retry_after_s
                        self.builder.release(host.name, stream)
                case ev.Fetch():
                    raise AssertionError("all models are on all disks")
        assert host.machine.resident_bytes <= 4 * GB
        if self._warmths(host) != before:
            self._load(host)

    def _ready(self, host: SimHost, model: str) -> None:
        self._tell(host, ev.Ready(model, LOAD_S))
        for stream, asking in [w for w in host.waiting if w[1].model == model]:
            host.waiting.remove((stream, asking))
            self._begin(host, asking, stream)

    def _warmths(self, host: SimHost) -> dict[str, Warmth]:
        words: dict[str, Warmth] = {"queued": "loading", "loading": "loading", "warm": "warm"}
        states = host.machine.models()
        return {m: "loading" if s.again else words.get(s.memory, "disk") for m, s in states.items()}

    def _load(self, host: SimHost) -> None:
        engines = []
        for model, warmth in self._warmths(host).items():
            eta_ms = round(host.machine.eta_s(model, self.now) * 1e3)
            why = host.machine.why_refused(model, self.now)
            running, ready = host.legs.get(model, 0), warmth == "warm"
            waiting = sum(asking.model == model for _, asking in host.waiting)
            engines.append(
                EngineLoad(
                    *(
                        model,
                        ready,
                        0,
                        running,
                        waiting,
                        1000,
                        0,
                        1000,
                        1000.0,
                        20.0,
                        0,
                        0,
                        running,
                    ),
                    *(warmth, eta_ms, 3 * GB, why),
                )
            )
        load = Load(engines, [], False, 4 * GB, host.machine.resident_bytes)
        self.builder.set_load(host.name, load, self.now)

    def _push(self, host: SimHost) -> None:
        self._load(host)
        self._in(1.0, lambda: self._push(host))

    # ---- the router ----------------------------------------------------------------------------

    def _look(self) -> None:
        """Placement, looked after every tenth of a second."""
        due = self.placement.next_deadline()
        if due is not None and due <= self.now:
            for word in self.placement.handle(Looked(self.builder.snapshot()), self.now):
                self.builder.set_wanted(word.node, word.message.model, self.now)
                until = self.now + word.message.hold_ms / 1e3
                self._tell(self.hosts[word.node], ev.Held(word.message.model, until))
        self._in(0.1, self._look)

    def _in(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._order), call))


def _hello(node: Node) -> Hello:
    offers = [
        ModelOffer(model, "00ff", 4096, 1000, 16, 1000, "bfloat16", "127.0.0.1:1")
        for model in node.models
    ]
    roles = sorted(node.roles)
    return Hello(1, 3, "sim", "node", node.name, node.site, "1", roles, offers)
