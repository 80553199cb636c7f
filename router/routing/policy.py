"""Which pair of nodes serves a request: hard rules filter, then costs in seconds rank.

``choose`` is a pure function of the request, a frozen view, the clock and a random generator, so a
decision can be replayed, explained and tested. The cost model is ``router.routing.costs``.
"""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass

from router.routing import costs
from router.routing.costs import Reason, Work
from router.routing.view import NodeView, View
from topology.model import Position
from wire.errors import OverloadError, RequestError

ROUTE_HEADER = "x-popmesh-route"

MAX_ROUTES = 4
"""Ranked routes that a plan can show: the choice and three fallbacks, as many as a request has
attempts. A retry plans anew."""

TIE_SECONDS = 0.002
TIE_FRACTION = 0.005
"""Routes within this of the best are ties; independent routers spread over them by two random
choices instead of all picking the same one. Guess: below the noise of the estimates."""

MAX_EXCUSES = 8
"""Nodes named in the message of a refusal."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Nodes that a request insists on; None leaves the choice open."""

    prefill: str | None = None
    decode: str | None = None


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What routing needs to know of a request.

    ``regions`` limits both sites (empty: anywhere). ``avoid_nodes`` and ``avoid_pairs`` failed this
    very request before.
    """

    work: Work
    client: Position
    regions: frozenset[str] = frozenset()
    pin: Pin = Pin()
    avoid_nodes: frozenset[str] = frozenset()
    avoid_pairs: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Route:
    """One pair of nodes, as they started last; ``reasons`` sum to ``cost_s``."""

    prefill: str
    decode: str
    prefill_site: str
    decode_site: str
    cost_s: float
    reasons: tuple[Reason, ...]
    prefill_incarnation: str = ""
    decode_incarnation: str = ""


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
    _check_pin(view, request.pin, model)
    rejected: list[tuple[str, str]] = []
    prefills: list[_Candidate] = []
    decodes: list[_Candidate] = []
    for name, node in view.nodes.items():
        why = obstacle(node, request, view)
        if why is not None:
            rejected.append((name, why))
            continue
        trip, _ = costs.client_rtt_s(view, request.client, node)
        if "prefill" in node.roles and request.pin.prefill in (None, name):
            prefills.append(_prefill_candidate(view, node, request.work, trip, now))
        if "decode" in node.roles and request.pin.decode in (None, name):
            decodes.append(_decode_candidate(view, node, request.work, trip))
    ranked = _best_pairs(prefills, decodes, request, view, now)
    if not ranked:
        raise _no_route(request, rejected, bool(prefills), bool(decodes))
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
    offer = node.offers.get(model)
    if offer is None:
        return f"does not serve {model}"
    if configured is not None and configured.digest not in (None, offer.identity):
        return f"its {model} is not the one the topology pins"
    engine = node.engines.get(model)
    if engine is None or not engine.ready:
        return "engine not ready"
    room = offer.total_blocks * offer.block_tokens
    # A prompt over the context is let through: the node says so with the exact count.
    if room < request.work.prompt_tokens <= offer.context_tokens:
        return f"its KV cache holds {room} tokens"
    return None


# ---- candidates --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A node with the part of the cost that depends on it alone."""

    cost_s: float
    node: NodeView


@dataclass(frozen=True, slots=True)
class _Pair:
    cost_s: float
    prefill: NodeView
    decode: NodeView


def _prefill_candidate(
    view: View, node: NodeView, work: Work, trip: float, now: float
) -> _Candidate:
    queue, _ = costs.queue_s(view, node, work.model, now)
    compute, _ = costs.compute_s(view, node, work)
    return _Candidate(trip + queue + compute, node)


def _decode_candidate(view: View, node: NodeView, work: Work, trip: float) -> _Candidate:
    decode, _ = costs.decode_s(view, node, work)
    return _Candidate(trip / 2 + decode, node)


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
            bisect.insort(best, _Pair(cost, p, d), key=_pair_order)
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
    ours, theirs = prefill.offers[model], decode.offers[model]
    return (
        ours.identity == theirs.identity and ours.dtype == theirs.dtype and bool(theirs.kv_address)
    )


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

    A hand-over spends bandwidth that no term prices, so it loses against a single node.
    """
    limit = ranked[0].cost_s * (1 + TIE_FRACTION) + TIE_SECONDS
    ties = [at for at, pair in enumerate(ranked) if pair.cost_s <= limit]
    ties = [at for at in ties if ranked[at].prefill is ranked[at].decode] or ties
    return min(rng.choices(ties, k=2))


def _explained(pair: _Pair, request: RouteRequest, view: View, now: float) -> Route:
    work, prefill, decode = request.work, pair.prefill, pair.decode
    there, there_detail = costs.client_rtt_s(view, request.client, prefill)
    back, back_detail = costs.client_rtt_s(view, request.client, decode)
    reasons = (
        Reason("to_prefill", there, there_detail),
        Reason("queue", *costs.queue_s(view, prefill, work.model, now)),
        Reason("prefill", *costs.compute_s(view, prefill, work)),
        *_pair_terms(prefill, decode, work, view, now),
        Reason("decode", *costs.decode_s(view, decode, work)),
        Reason("to_client", back / 2, f"half of {back_detail}"),
    )
    return Route(
        prefill=prefill.name,
        decode=decode.name,
        prefill_site=prefill.site,
        decode_site=decode.site,
        cost_s=sum(reason.seconds for reason in reasons),
        reasons=reasons,
        prefill_incarnation=prefill.incarnation,
        decode_incarnation=decode.incarnation,
    )


# ---- refusals ----------------------------------------------------------------------------------


def known_models(view: View) -> list[str]:
    """Names that the topology lists or a node offers."""
    return sorted(view.topology.models.keys() | view.offered.keys())


def check_model(view: View, model: str) -> None:
    """Raises ``RequestError`` (``model_not_found``) for a name that nobody knows."""
    if model in view.offered or model in view.topology.models:
        return
    known = ", ".join(known_models(view))
    raise RequestError(
        f"the model {model[:80]!r} does not exist; available: {known or 'none'}",
        code="model_not_found",
        param="model",
    )


def _check_pin(view: View, pin: Pin, model: str) -> None:
    for role, name in (("prefill", pin.prefill), ("decode", pin.decode)):
        if name is None:
            continue
        node = view.topology.nodes.get(name)
        if node is None:
            problem = f"there is no node {name[:80]!r}"
        elif role not in node.roles:
            problem = f"{name} has no {role} role"
        elif model not in node.models:
            problem = f"{name} does not serve {model}"
        else:
            continue
        raise RequestError(f"{ROUTE_HEADER}: {problem}", code="invalid_value", param=ROUTE_HEADER)


def _no_route(
    request: RouteRequest, rejected: list[tuple[str, str]], any_prefill: bool, any_decode: bool
) -> OverloadError:
    if any_prefill and any_decode:
        missing = "no two nodes that can hand over to each other"
    else:
        missing = " and ".join(
            name for name, have in (("prefill", any_prefill), ("decode", any_decode)) if not have
        )
        missing = f"no node for {missing}"
    excuses = "; ".join(f"{name}: {why}" for name, why in rejected[:MAX_EXCUSES])
    return OverloadError(
        f"{request.work.model}: {missing} at the moment" + (f" ({excuses})" if excuses else ""),
        code="no_route",
        retry_after_s=1.0,
    )
