"""How a request goes on after an attempt broke: another decode node, or another plan, by price.

    retarget   the running prefill leg hands its KV to another decode node; nothing is recomputed
    salvage    a new plan that uses KV which a decode node kept of an unfinished hand-over
    resume     a new plan for the prompt and the tokens that the client has read
    recompute  a new plan from the beginning

Pure: request, broken attempt, frozen view, clock and random generator in; a choice with both prices
out. What a new plan costs is ``policy``'s; the words of the prices are ``costs``'.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from router.routing import costs
from router.routing.avoidance import NodeStart, Pair
from router.routing.costs import Reason, Work
from router.routing.loading import is_cold
from router.routing.policy import Route, RouteRequest, choose, may_hand_over, obstacle
from router.routing.view import NodeView, View
from wire.errors import MeshError, OverloadError

RecoveryKind = Literal["retarget", "salvage", "resume", "recompute"]

RETARGET_VERSION = 2
"""Version of the mesh wire from which a prefill leg can be given another decode node."""

SALVAGE_MOST_S = 1.0
"""Longest wait for what a decode node kept: a round trip of any mesh fits several times."""

SALVAGE_LEAST_S = 0.02
"""Waits below this are not worth it: asking takes about as long as computing anew. Guess."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """How an attempt takes over, its price in seconds, and the best of what was not chosen."""

    kind: RecoveryKind
    price_s: float
    other_kind: RecoveryKind | None = None
    other_price_s: float | None = None


@dataclass(frozen=True, slots=True)
class RunningPrefill:
    """A prefill leg that could hand over to another decode node.

    ``remaining_s`` estimates what it still has to compute. Nodes of ``barred`` had a leg of the
    same stream and still owe its end, which could not be told from that of a new one.
    """

    node: NodeStart
    remaining_s: float
    barred: frozenset[str]


@dataclass(frozen=True, slots=True)
class Broken:
    """What broken attempts leave behind.

    ``kept`` maps nodes to the tokens at the beginning of prompt and answer whose KV they hold since
    a hand-over broke. ``running`` is the prefill leg that goes on. ``relayed`` output tokens are
    part of the next prompt; the retry budget applies only while there are none.
    """

    avoid_nodes: frozenset[NodeStart]
    avoid_pairs: frozenset[Pair]
    kept: Mapping[NodeStart, int]
    running: RunningPrefill | None
    relayed: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the next attempt runs, and whether the running prefill leg is part of it."""

    route: Route
    keeps_prefill: bool
    recovery: Recovery


def choose_recovery(
    request: RouteRequest, broken: Broken, view: View, now: float, rng: random.Random
) -> Choice:
    """The cheaper of keeping the prefill leg and a new plan.

    ``request`` is the request as at its start, with cached tokens as known now. When nothing passes
    because of what is avoided, avoidance is forgotten. Raises as ``policy.choose`` does.
    """
    request = _grown(request, broken.relayed)
    try:
        return _cheapest(_avoiding(request, broken, view), broken, view, now, rng)
    except OverloadError:
        if not broken.avoid_nodes and not broken.avoid_pairs:
            raise
    return _cheapest(request, broken, view, now, rng)


def salvage_patience_s(work: Work, view: View) -> float:
    """How long a decode node's word on kept KV is worth waiting for, 0 if it is not.

    ``min(SALVAGE_MOST_S, prefill of the uncached prompt at the fastest ready node / 2)``.
    """
    computes = [
        costs.compute_s(view, node, work)[0]
        for node in view.nodes.values()
        if work.model in node.engines and node.engines[work.model].ready
    ]
    patience = min([SALVAGE_MOST_S, *(seconds / 2 for seconds in computes)])
    return patience if computes and patience >= SALVAGE_LEAST_S else 0.0


# ---- new plans ---------------------------------------------------------------------------------


def _cheapest(
    request: RouteRequest, broken: Broken, view: View, now: float, rng: random.Random
) -> Choice:
    kept = _handed_on(request, broken, view, now)
    try:
        plan = choose(_with_kept(request, broken, view), view, now, rng, fallbacks=0)
    except MeshError:
        if kept is None:
            raise
        return Choice(kept, True, Recovery("retarget", kept.cost_s))
    fresh = plan.route
    usual: RecoveryKind = "resume" if broken.relayed else "recompute"
    kind, other_kind, other_s = usual, None, None
    if _live(broken, view).keys() & {fresh.prefill, fresh.decode}:
        without = choose(request, view, now, rng, fallbacks=0).route.cost_s
        if without > fresh.cost_s:
            kind, other_kind, other_s = "salvage", usual, without
    if kept is None:
        return Choice(fresh, False, Recovery(kind, fresh.cost_s, other_kind, other_s))
    if kept.cost_s <= fresh.cost_s:
        return Choice(kept, True, Recovery("retarget", kept.cost_s, kind, fresh.cost_s))
    return Choice(fresh, False, Recovery(kind, fresh.cost_s, "retarget", kept.cost_s))


def _grown(request: RouteRequest, relayed: int) -> RouteRequest:
    """The request with what was relayed as part of its prompt."""
    work = request.work
    tokens, left = work.prompt_tokens + relayed, max(1, work.output_tokens - relayed)
    return replace(request, work=replace(work, prompt_tokens=tokens, output_tokens=left))


def _live(broken: Broken, view: View) -> dict[str, int]:
    """Kept tokens by node, of nodes that still run as they did."""
    nodes = view.nodes
    return {
        start.name: tokens
        for start, tokens in broken.kept.items()
        if tokens > 0 and start.name in nodes and nodes[start.name].incarnation == start.incarnation
    }


def _with_kept(request: RouteRequest, broken: Broken, view: View) -> RouteRequest:
    cached = dict(request.work.cached)
    for name, tokens in _live(broken, view).items():
        cached[name] = max(tokens, cached.get(name, 0))
    return replace(request, work=replace(request.work, cached=cached))


def _avoiding(request: RouteRequest, broken: Broken, view: View) -> RouteRequest:
    """The request without nodes and pairs that failed it, as long as they are the same starts."""
    starts = {NodeStart(name, node.incarnation) for name, node in view.nodes.items()}
    return replace(
        request,
        avoid_nodes=frozenset(node.name for node in broken.avoid_nodes if node in starts),
        avoid_pairs=frozenset(
            (pair.prefill.name, pair.decode.name)
            for pair in broken.avoid_pairs
            if pair.prefill in starts and pair.decode in starts
        ),
    )


# ---- the running prefill leg -------------------------------------------------------------------


def _handed_on(request: RouteRequest, broken: Broken, view: View, now: float) -> Route | None:
    """The cheapest way to give the running prefill leg another decode node, if there is one."""
    running = broken.running
    if running is None:
        return None
    prefill = view.nodes.get(running.node.name)
    engine = None if prefill is None else prefill.engines.get(request.work.model)
    if (
        prefill is None
        or engine is None
        or not engine.ready  # whatever ran there is gone
        or prefill.incarnation != running.node.incarnation
        or prefill.version < RETARGET_VERSION
    ):
        return None
    routes = [
        _to_decode(request, running, prefill, decode, view, now)
        for decode in view.nodes.values()
        if _may_take_over(request, running, prefill, decode, view)
    ]
    return min(routes, key=lambda route: (route.cost_s, route.decode), default=None)


def _may_take_over(
    request: RouteRequest, running: RunningPrefill, prefill: NodeView, decode: NodeView, view: View
) -> bool:
    return (
        decode.name != prefill.name
        and decode.name not in running.barred
        and "decode" in decode.roles
        and request.pin.decode in (None, decode.name)
        and obstacle(decode, request, view) is None
        and not is_cold(decode, request.work.model)  # the leg waits a few seconds at most
        and may_hand_over(prefill, decode, request)
    )


def _to_decode(
    request: RouteRequest,
    running: RunningPrefill,
    prefill: NodeView,
    decode: NodeView,
    view: View,
    now: float,
) -> Route:
    work = request.work
    there, there_detail = costs.client_rtt_s(view, request.client, prefill)
    back, back_detail = costs.client_rtt_s(view, request.client, decode)
    remaining = running.remaining_s
    reasons = (
        Reason("to_prefill", there, there_detail),
        Reason("prefill", remaining, "what the running prefill leg has left"),
        Reason("kv_tail", *costs.kv_tail_s(view, prefill, decode, work, hide_s=remaining)),
        Reason("interference", *costs.interference_s(view, decode, work, now)),
        Reason("decode", *costs.decode_s(view, decode, work)),
        Reason("to_client", back / 2, f"half of {back_detail}"),
    )
    return Route.between(prefill, decode, reasons)
