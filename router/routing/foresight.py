"""What would follow if a planned route broke, for ``explain``: the same choice, the same prices.

Pure; runs nothing. Three accidents stand for all: the decode node is lost with the prompt computed,
the prefill node is lost half way, and, where both are one, that node is lost.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from router.routing.avoidance import NodeStart
from router.routing.policy import Route, RouteRequest
from router.routing.recovery import Broken, Choice, RunningPrefill, choose_recovery
from router.routing.view import View
from wire.errors import MeshError


@dataclass(frozen=True, slots=True)
class Foreseen:
    """``lost`` names the accident; no ``choice``: the request would wait for a route."""

    lost: str
    choice: Choice | None


def foresee(
    request: RouteRequest, route: Route, view: View, now: float, rng: random.Random
) -> tuple[Foreseen, ...]:
    """Recoveries of ``route``, as the view is now."""
    prefill = NodeStart(route.prefill, route.prefill_incarnation)
    decode = NodeStart(route.decode, route.decode_incarnation)
    running = RunningPrefill(prefill, 0.0, frozenset())
    half = {decode: request.work.prompt_tokens // 2}
    accidents = [
        (f"{decode.name}, in flight", _without(decode, running=running)),
        (f"{prefill.name}, half way", _without(prefill, kept=half)),
    ]
    if prefill == decode:
        accidents = [(prefill.name, _without(prefill))]
    return tuple(
        Foreseen(lost, _choice(request, broken, view, now, rng)) for lost, broken in accidents
    )


def _without(
    node: NodeStart,
    running: RunningPrefill | None = None,
    kept: dict[NodeStart, int] | None = None,
) -> Broken:
    return Broken(frozenset((node,)), frozenset(), kept or {}, running, relayed=0)


def _choice(
    request: RouteRequest, broken: Broken, view: View, now: float, rng: random.Random
) -> Choice | None:
    """As after the accident: the lost node has no link, so that it is not forgiven either."""
    nodes = {name: node for name, node in view.nodes.items() if name not in _names(broken)}
    lost = View(view.topology, view.router_site, nodes, view.offered, view.speeds)
    try:
        return choose_recovery(request, broken, lost, now, rng)
    except MeshError:
        return None


def _names(broken: Broken) -> set[str]:
    return {node.name for node in broken.avoid_nodes}
