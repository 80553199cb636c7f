"""Which nodes keep which models in memory because a region keeps asking for them.

Pure: ``effects = machine.handle(event, now)``. A region that asks for a model often enough
(``Topology.placement``) has a *place* for it: one of its nodes is told to have it in memory
(``Warm``), more when one could not serve what is asked, and told again while the demand lasts. When
it has ended, nobody says anything, and the last word runs out at the node.

Several routers decide alone, each for the demand that it sees: a ``Warm`` said twice is one.

What keeps it from flapping: a place outlives its demand by ``cool_after_s``; a node that was chosen
is left only when it cannot serve any more, or is gone for longer than ``MISSING_S``; and where two
models want the same memory, the newcomer needs ``DISPLACE`` times the demand.

Leases must not shut out what is asked for rarely: when a model finds no memory on any node, the
node with the least demand is told nothing until the model has come, or for a while, and serves
whoever is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import assert_never

from router.placement.candidates import Candidate, can_be_had, is_in_memory, look_for
from router.placement.demand import Demand, Rates
from router.placement.leases import LEASE_S, Leases
from router.placement.words import Asked, Decision, Event, Looked, SayWarm
from router.routing.costs import typical_speed
from router.routing.speeds import BATCH_DOUBLING, base_step_s, prefill_rate
from router.routing.view import View
from topology.model import Topology
from wire.messages import Role

LOOK_S = 1.0
"""Between two looks at the mesh while there is demand; loads are pushed once a second."""

FULL = 0.7
"""Share of a node's time from which another copy is wanted. Guess: queues grow long beyond it."""

DISPLACE = 2.0
"""A model takes the memory of one that has a place only with so many times its demand. Guess."""

MISSING_S = 10.0
"""A chosen node that cannot be reached keeps its place for so long: two detection times, more than
a lost connection or a restarted agent takes."""

COOL_LEAST_S = 5.0
"""A place lasts so long at least: leases must not end between two looks."""

YIELD_S = LEASE_S + 60.0
"""How long a node is told nothing, at most, so that a model which finds no memory anywhere may
come: its lease ends, and for a minute it goes to whoever is asked for. Guess: more than clients
retry."""

ASKED_LATELY_PER_MIN = math.exp(-1)
"""What is left of one request after a minute: it may still be tried again."""

ROLES: tuple[Role, Role] = ("prefill", "decode")


@dataclass(slots=True)
class _Place:
    """``needed[k]`` is until when a (k+1)th copy is; ``missing`` since when nodes are gone."""

    needed: list[float] = field(default_factory=list)
    nodes: tuple[str, ...] = ()
    missing: dict[str, float] = field(default_factory=dict)


class PlacementMachine:
    """See the module. Times are seconds on the router's clock."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._rules = topology.placement
        self._cool_s = max(COOL_LEAST_S, topology.placement.cool_after_s)
        self._sites: dict[str, frozenset[str]] = {}  # by region
        for site in topology.sites.values():
            self._sites[site.region] = self._sites.get(site.region, frozenset()) | {site.name}
        self._demand = Demand()
        self._places: dict[tuple[str, str], _Place] = {}
        self._leases = Leases(topology)
        self._yields: dict[str, tuple[float, str]] = {}  # by node: until when, to which model
        self._decisions: tuple[Decision, ...] = ()
        self._look_at: float | None = None

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """As of the last look, by model and region."""
        return self._decisions

    def next_deadline(self) -> float | None:
        """When the machine wants to see the mesh; None: nothing is asked."""
        return self._look_at

    def handle(self, event: Event, now: float) -> list[SayWarm]:
        """Words to nodes."""
        match event:
            case Asked(model, site, prompt_tokens, output_tokens):
                if self._rules.warm_per_min > 0:
                    self._demand.add(model, site, prompt_tokens, output_tokens, now)
                    self._asked(model, self._topology.sites[site].region, now)
                return []
            case Looked(view):
                return self._look(view, now)
            case _:
                assert_never(event)

    # ---- demand -------------------------------------------------------------------------------

    def _asked(self, model: str, region: str, now: float) -> None:
        """Look at once when a region begins to ask often, else with the next turn."""
        place = self._places.get((model, region))
        if place is None and self._is_hot(self._rates(model, region, now)):
            self._places[model, region] = _Place([now + self._cool_s])
            self._look_at = now
        elif self._look_at is None:
            self._look_at = now + LOOK_S

    def _rates(self, model: str, region: str, now: float) -> Rates:
        return self._demand.rates(model, self._sites[region], now)

    def _is_hot(self, rates: Rates) -> bool:
        return rates.per_min >= self._rules.warm_per_min

    def _renew(self, place: _Place, copies: int, now: float) -> None:
        """So many copies are needed now; each stays needed a while longer."""
        until = now + self._cool_s
        needed = [until] * copies + place.needed[copies:]
        place.needed = [until for until in needed if until > now]

    # ---- looking ------------------------------------------------------------------------------

    def _look(self, view: View, now: float) -> list[SayWarm]:
        self._demand.forget(now)
        sites = self._topology.sites
        asking = {(model, sites[site].region) for model, site in self._demand}
        rates = {key: self._rates(*key, now) for key in asking | self._places.keys()}
        decisions: list[Decision] = []
        words: list[SayWarm] = []
        room = self._room(view)
        self._yields = {
            name: (until, model)
            for name, (until, model) in self._yields.items()
            if until > now and not is_in_memory(view, name, model)
        }
        for key in sorted(rates, key=lambda key: self._urgency(key, rates[key])):
            decision, until = self._decide(key, rates[key], view, room, now)
            decisions.append(decision)
            for name in decision.nodes:
                node = view.nodes.get(name)
                if node is not None and name not in self._yields:
                    words += self._leases.renew(decision.model, node, until[name], now)
        self._decisions = tuple(sorted(decisions, key=lambda d: (d.model, d.region)))
        self._look_at = now + LOOK_S if rates else None
        self._leases.forget(now)
        self._yield_to_others(view, now)
        return words

    def _yield_to_others(self, view: View, now: float) -> None:
        """Let a node go for each model that was asked for lately and that nobody can load."""
        kept = {node: d.per_min for d in self._decisions for node in d.nodes}
        for decision in self._decisions:
            model = decision.model
            if decision.nodes or decision.per_min < ASKED_LATELY_PER_MIN or can_be_had(view, model):
                continue
            could = [name for name in kept if model in view.topology.nodes[name].models]
            if could and not any(name in self._yields for name in could):
                least = min(could, key=lambda name: (kept[name], name))
                self._yields[least] = now + YIELD_S, model

    def _urgency(self, key: tuple[str, str], rates: Rates) -> tuple[float, tuple[str, str]]:
        """Who chooses first, the lowest: memory goes to the greatest demand, see ``DISPLACE``."""
        place = self._places.get(key)
        has_place = place is not None and bool(place.nodes)
        return -rates.per_min * (DISPLACE if has_place else 1.0), key

    def _room(self, view: View) -> dict[str, int]:
        """Bytes that each node with a budget has beside what is pinned there."""
        room: dict[str, int] = {}
        for name, node in view.nodes.items():
            if node.memory_bytes:
                pinned = view.topology.nodes[name].pinned
                taken = sum(e.memory_bytes for m, e in node.engines.items() if m in pinned)
                room[name] = node.memory_bytes - taken
        return room

    def _decide(
        self, key: tuple[str, str], rates: Rates, view: View, room: dict[str, int], now: float
    ) -> tuple[Decision, dict[str, float]]:
        """What to do for one model in one region, and until when each node is needed; takes the
        memory out of ``room``."""
        (model, region), least = key, self._rules.warm_per_min
        place, is_hot = self._places.get(key), self._is_hot(rates)
        if place is None and is_hot:
            place = self._places[key] = _Place()
        held = frozenset(place.nodes) if place is not None else frozenset[str]()
        asking = self._asking(model, region, now)
        found, left_out = look_for(view, model, region, asking, held, room)
        if place is not None:
            copies = _copies(rates, found, view, model) if is_hot else 0
            self._renew(place, copies, now)
        if place is None or not place.needed:
            self._places.pop(key, None)
            why = f"asked {rates.per_min:.1f} times a minute, {least:g} are needed"
            return Decision(model, region, rates.per_min, 0, (), 0.0, why), {}
        chosen = self._choose(place, found, view, now)
        place.nodes = tuple(chosen)
        kept = [candidate for candidate in found if candidate.node.name in chosen]
        for candidate in kept:
            if candidate.need_bytes:
                room[candidate.node.name] -= candidate.need_bytes
        until = place.needed[0]
        why = f"asked {rates.per_min:.1f} times a minute, {least:g} are enough"
        if not is_hot:
            why = f"asked {rates.per_min:.1f} times a minute now, kept another {until - now:.0f} s"
        yields = [
            f"{name} yields to {self._yields[name][1]}, which finds no memory anywhere"
            for name in place.nodes
            if name in self._yields
        ]
        why = "; ".join([why, *(candidate.why() for candidate in kept), *yields])
        out = tuple((name, reason) for name, reason in left_out if name not in chosen)
        decision = Decision(
            model, region, rates.per_min, len(place.needed), place.nodes, until, why, out
        )
        return decision, {name: place.needed[copy] for name, copy in chosen.items()}

    def _asking(self, model: str, region: str, now: float) -> dict[str, float]:
        """Requests a minute at the sites of a region."""
        sites = self._topology.sites
        asked = self._demand.by_site(model, now)
        return {site: rate for site, rate in asked.items() if sites[site].region == region}

    def _choose(
        self, place: _Place, found: list[Candidate], view: View, now: float
    ) -> dict[str, int]:
        """Nodes so that each role is there as often as copies are needed, as far as there are
        nodes; with the number of the copy, from 0, that each belongs to."""
        chosen: dict[str, int] = {}
        have: dict[Role, int] = dict.fromkeys(ROLES, 0)

        def take(name: str, copy: int) -> None:
            chosen[name] = copy
            for role in view.topology.nodes[name].roles:
                have[role] += 1

        place.missing = {
            name: place.missing.get(name, now)
            for name in place.nodes
            if name not in view.nodes or view.nodes[name].phase != "up"
        }
        for name, since in place.missing.items():
            if now - since < MISSING_S:
                take(name, min(have[role] for role in view.topology.nodes[name].roles))
        copies = len(place.needed)
        for role in ROLES:
            for candidate in found:
                name, has_role = candidate.node.name, role in candidate.node.roles
                if has_role and name not in chosen and have[role] < copies:
                    take(name, have[role])
        return {name: min(copy, copies - 1) for name, copy in chosen.items()}


def _copies(rates: Rates, found: list[Candidate], view: View, model: str) -> int:
    """Nodes that it takes to serve the demand, at most as many as there are.

        busy = prompt tokens/s / prefill rate + output tokens/s * step / BATCH_DOUBLING

    is the share of one node's time, with a batch that doubles the step (``router.routing.speeds``).
    """
    if not found:
        return 1
    best = found[0]
    typical = typical_speed(view, best.node, model)
    busy = rates.prompt_tokens_per_s / prefill_rate(best.engine, typical)
    busy += rates.output_tokens_per_s * base_step_s(best.engine, typical) / BATCH_DOUBLING
    return max(1, min(len(found), math.ceil(busy / FULL)))
