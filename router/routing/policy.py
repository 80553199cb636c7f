"""Which pair of nodes serves a request: hard rules filter, then costs in seconds rank.

``choose`` is a pure function of the request, a frozen view, the clock and a random generator, so a
decision can be replayed, explained and tested. The cost model is ``router.routing.costs``.
"""

from __future__ import annotations

import bisect
import math
import random
from dataclasses import dataclass

from router.routing import costs
from router.routing.costs import Reason, Work
from router.routing.loading import LoadWait, is_cold, load_wait, needless_loads
from router.routing.refusals import MAX_EXCUSE, REFUSED_S, check_model, check_pin, no_route
from router.routing.view import NodeView, View
from topology.model import Position
from wire.messages import MIN_VERSION

MAX_ROUTES = 4
"""Ranked routes that a plan can show: the choice and three fallbacks, as many as a request has
attempts. A retry plans anew."""

TIE_SECONDS = 0.002
TIE_FRACTION = 0.005
"""Routes within this of the best are ties; independent routers spread over them by two random
choices instead of all picking the same one. Guess: below the noise of the estimates."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Nodes that a request insists on; None leaves the choice open."""

    prefill: str | None = None
    decode: str | None = None


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What routing needs to know of a request.

    ``regions`` limits both sites (empty: anywhere). ``avoid_nodes`` and ``avoid_pairs`` failed this
    very request before. ``deadline`` is on the router's clock, seconds. ``wire_version`` of the
    mesh wire is the first that says all that is asked.
    """

    work: Work
    client: Position
    regions: frozenset[str] = frozenset()
    pin: Pin = Pin()
    deadline: float = math.inf
    avoid_nodes: frozenset[str] = frozenset()
    avoid_pairs: frozenset[tuple[str, str]] = frozenset()
    wire_version: int = MIN_VERSION


@dataclass(frozen=True, slots=True)
class Route:
    """One pair of nodes, as they started last; ``reasons`` sum to ``cost_s``.

    A node with a ``..._load_s`` above 0 does not have the model in memory yet and will so much
    later.
    """

    prefill: str
    decode: str
    prefill_site: str
    decode_site: str
    cost_s: float
    reasons: tuple[Reason, ...]
    prefill_incarnation: str = ""
    decode_incarnation: str = ""
    prefill_load_s: float = 0.0
    decode_load_s: float = 0.0

    @classmethod
    def between(
        cls,
        prefill: NodeView,
        decode: NodeView,
        reasons: tuple[Reason, ...],
        prefill_load_s: float = 0.0,
        decode_load_s: float = 0.0,
    ) -> Route:
        """The route over these two, as they are now, at the price that ``reasons`` add up to."""
        return cls(
            prefill=prefill.name,
            decode=decode.name,
            prefill_site=prefill.site,
            decode_site=decode.site,
            cost_s=sum(reason.seconds for reason in reasons),
            reasons=reasons,
            prefill_incarnation=prefill.incarnation,
            decode_incarnation=decode.incarnation,
            prefill_load_s=prefill_load_s,
            decode_load_s=decode_load_s,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen route, the next best ones in order, and why other nodes were out."""

    route: Route
    fallbacks: tuple[Route, ...]
    rejected: tuple[tuple[str, str], ...]


def choose(
    request: RouteRequest,
    view: View,
    now: float,
    rng: random.Random,
    fallbacks: int = MAX_ROUTES - 1,
) -> Plan:
    """The best route by cost, with at most ``fallbacks`` of the next best.

    Raises ``RequestError`` (``model_not_found``; ``invalid_value`` for a pin that cannot be) and
    ``OverloadError`` (``no_route``) when no pair passes the hard rules at the moment.
    """
    model = request.work.model
    check_model(view, model)
    check_pin(view, "prefill", request.pin.prefill, model)
    check_pin(view, "decode", request.pin.decode, model)
    rejected: list[tuple[str, str]] = []
    prefills: list[_Candidate] = []
    decodes: list[_Candidate] = []
    waits: list[float] = []  # until a node could have the model, where that is all it lacks
    for name, node in view.nodes.items():
        why, load = obstacle(node, request, view), load_wait(node, model, now)
        if load.seconds and why is None:
            waits.append(load.seconds)
            why = _too_late(view, node, load, request, now)
        elif load.seconds and node.engines[model].warm_refused:
            waits.append(REFUSED_S)
        if why is not None:
            rejected.append((name, why))
            continue
        trip, _ = costs.client_rtt_s(view, request.client, node)
        if "prefill" in node.roles and request.pin.prefill in (None, name):
            prefills.append(_prefill_candidate(view, node, load, request.work, trip, now))
        if "decode" in node.roles and request.pin.decode in (None, name):
            decodes.append(_decode_candidate(view, node, load, request.work, trip))
    ranked: list[_Pair] = []
    if waits:
        ranked = _best_pairs(_needed(prefills), _needed(decodes), request, view, now)
        rejected += _needless(prefills, decodes).items() if ranked else ()
    if not ranked:  # all are in memory, or those that load it cannot hand over to each other
        ranked = _best_pairs(prefills, decodes, request, view, now)
    if not ranked:
        missing = {"prefill": not prefills, "decode": not decodes}
        raise no_route(model, rejected, missing, waits)
    first = _among_ties(ranked, rng)
    route = ranked.pop(first)
    return Plan(
        _explained(route, request, view, now),
        tuple(_explained(pair, request, view, now) for pair in ranked[:fallbacks]),
        tuple(rejected),
    )


def obstacle(node: NodeView, request: RouteRequest, view: View) -> str | None:
    """The hard rule that keeps ``node`` out of any route for this request, or None."""
    model = request.work.model
    configured = view.topology.models.get(model)
    if node.name in request.avoid_nodes:
        return "failed this request before"
    if request.regions and node.region not in request.regions:
        return f"region {node.region} is not allowed for this tenant"
    if configured is not None and configured.regions and node.region not in configured.regions:
        return f"region {node.region} is not allowed for {model}"
    if node.phase != "up":
        return "no link"
    if node.draining:
        return "draining"
    if node.version < request.wire_version:
        return f"speaks version {node.version} of the mesh wire, which cannot say what is asked"
    offer, engine = node.offers.get(model), node.engines.get(model)
    cold = (engine is None or not engine.ready) and is_cold(node, model)
    if offer is None and not cold:
        return f"does not serve {model}"
    if node.offers_another(model, view.topology):
        return f"its {model} is not the one the topology pins"
    if engine is None or not (engine.ready or cold):
        return "engine not ready"
    if cold and engine.warm_refused:
        return f"cannot load it: {engine.warm_refused[:MAX_EXCUSE]}"
    if offer is None:  # of a model that is not on its disk yet; it checks what it fetches
        return None
    room = offer.total_blocks * offer.block_tokens
    # A prompt over the context is let through: the node says so with the exact count.
    if room < request.work.prompt_tokens <= offer.context_tokens:
        return f"its KV cache holds {room} tokens"
    return None


def _too_late(
    view: View, node: NodeView, load: LoadWait, request: RouteRequest, now: float
) -> str | None:
    """No model is loaded for a request that could not have its first token in time."""
    compute, _ = costs.compute_s(view, node, request.work)
    if now + load.seconds + compute < request.deadline:
        return None
    return f"{load.detail}, too late for this request"


# ---- candidates --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A node with the part of the cost that depends on it alone."""

    cost_s: float
    node: NodeView
    load: LoadWait


@dataclass(frozen=True, slots=True)
class _Pair:
    cost_s: float
    prefill: NodeView
    decode: NodeView
    prefill_load: LoadWait
    decode_load: LoadWait


def _prefill_candidate(
    view: View, node: NodeView, load: LoadWait, work: Work, trip: float, now: float
) -> _Candidate:
    queue, _ = costs.queue_s(view, node, work.model, now)
    compute, _ = costs.compute_s(view, node, work)
    return _Candidate(trip + load.seconds + queue + compute, node, load)


def _decode_candidate(
    view: View, node: NodeView, load: LoadWait, work: Work, trip: float
) -> _Candidate:
    """What its load adds depends on that of the prefill node: both go on at the same time."""
    decode, _ = costs.decode_s(view, node, work)
    return _Candidate(trip / 2 + decode, node, load)


def _needless(*lists: list[_Candidate]) -> dict[str, str]:
    """Nodes of none of these lists that should load the model for this request, with why."""
    loads = [needless_loads((c.node.name, c.load) for c in found) for found in lists]
    kept = {c.node.name for found in lists for c in _needed(found)}
    return {name: why for load in loads for name, why in load.items() if name not in kept}


def _needed(candidates: list[_Candidate]) -> list[_Candidate]:
    needless = needless_loads((found.node.name, found.load) for found in candidates)
    return [found for found in candidates if found.node.name not in needless]


def _best_pairs(
    prefills: list[_Candidate],
    decodes: list[_Candidate],
    request: RouteRequest,
    view: View,
    now: float,
) -> list[_Pair]:
    """The ``MAX_ROUTES`` cheapest allowed pairs, cheapest first.

    Terms of a pair are never negative, so with both lists sorted, a pair whose separate costs
    already exceed the worst kept total ends the search: exact, and far from all pairs in a large
    mesh.
    """
    prefills.sort(key=_order)
    decodes.sort(key=_order)
    best: list[_Pair] = []
    for prefill in prefills:
        for decode in decodes:
            floor = prefill.cost_s + decode.cost_s
            if len(best) == MAX_ROUTES and floor >= best[-1].cost_s:
                break
            p, d = prefill.node, decode.node
            if not may_hand_over(p, d, request):
                continue
            cost = floor + sum(term.seconds for term in _pair_terms(p, d, request.work, view, now))
            if decode.load.seconds > prefill.load.seconds:  # both load at the same time
                cost += decode.load.seconds - prefill.load.seconds
            pair = _Pair(cost, p, d, prefill.load, decode.load)
            bisect.insort(best, pair, key=_pair_order)
            del best[MAX_ROUTES:]
    return best


def _order(candidate: _Candidate) -> tuple[float, str]:
    return candidate.cost_s, candidate.node.name


def _pair_order(pair: _Pair) -> tuple[float, str, str]:
    return pair.cost_s, pair.prefill.name, pair.decode.name


def may_hand_over(prefill: NodeView, decode: NodeView, request: RouteRequest) -> bool:
    """Two nodes may hand KV over only when they compute the same model."""
    if (prefill.name, decode.name) in request.avoid_pairs:
        return False
    if prefill.name == decode.name:
        return True
    model = request.work.model
    ours, theirs = prefill.offers.get(model), decode.offers.get(model)
    if ours is None or theirs is None:
        return False
    # Where a cold decode node takes KV is known once it has the model in memory.
    reachable = bool(theirs.kv_address) or is_cold(decode, model)
    return ours.identity == theirs.identity and ours.dtype == theirs.dtype and reachable


def _pair_terms(
    prefill: NodeView, decode: NodeView, work: Work, view: View, now: float
) -> tuple[Reason, ...]:
    if prefill.name == decode.name:
        return (Reason("kv_tail", 0.0, "same node"),)
    return (
        Reason("kv_tail", *costs.kv_tail_s(view, prefill, decode, work)),
        Reason("interference", *costs.interference_s(view, decode, work, now)),
    )


def _among_ties(ranked: list[_Pair], rng: random.Random) -> int:
    """Index of the better of two random routes among those as good as the best.

    A hand-over spends bandwidth that no term prices, so it loses against a single node. When the
    best one waits for a load, chance would only make independent routers load more copies.
    """
    if ranked[0].prefill_load.seconds or ranked[0].decode_load.seconds:
        return 0
    limit = ranked[0].cost_s * (1 + TIE_FRACTION) + TIE_SECONDS
    ties = [at for at, pair in enumerate(ranked) if pair.cost_s <= limit]
    ties = [at for at in ties if ranked[at].prefill is ranked[at].decode] or ties
    return min(rng.choices(ties, k=2))


def _explained(pair: _Pair, request: RouteRequest, view: View, now: float) -> Route:
    work, prefill, decode = request.work, pair.prefill, pair.decode
    there, there_detail = costs.client_rtt_s(view, request.client, prefill)
    back, back_detail = costs.client_rtt_s(view, request.client, decode)
    load = max(pair.prefill_load, pair.decode_load, key=lambda load: load.seconds)
    node = prefill if load is pair.prefill_load else decode
    loading = (Reason("load", load.seconds, f"{node.name}: {load.detail}"),)
    reasons = (
        Reason("to_prefill", there, there_detail),
        *(loading if load.seconds else ()),
        Reason("queue", *costs.queue_s(view, prefill, work.model, now)),
        Reason("prefill", *costs.compute_s(view, prefill, work)),
        *_pair_terms(prefill, decode, work, view, now),
        Reason("decode", *costs.decode_s(view, decode, work)),
        Reason("to_client", back / 2, f"half of {back_detail}"),
    )
    return Route.between(
        prefill, decode, reasons, pair.prefill_load.seconds, pair.decode_load.seconds
    )
