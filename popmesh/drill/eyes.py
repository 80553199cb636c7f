"""From routers' own JSON to what a drill has to know: who is whole, is everything at rest. Pure.

``statuses`` maps a router's URL to its ``/popmesh/status``, None where it did not answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from popmesh.drill.counters import Sample
from popmesh.drill.world import MeshSeen, NodeSeen, RouterSeen

Statuses = Mapping[str, Mapping[str, Any] | None]

_COUNTS = ("running", "waiting", "transfers_in", "transfers_out", "streams")
RESERVATIONS = "popmesh_reservations"


def mesh_seen(
    statuses: Statuses, starts: Mapping[str, int], model: str, known: MeshSeen
) -> MeshSeen:
    """The mesh as all answering routers see it together; nodes of ``known`` are never forgotten."""
    nodes = {node.name: _gone(node) for node in known.nodes}
    for status in statuses.values():
        for said in status["nodes"] if status is not None else ():
            nodes.setdefault(said["name"], _node(said, model))
    for status in statuses.values():
        if status is None:
            continue
        seen = {said["name"]: _node(said, model) for said in status["nodes"]}
        for name, node in nodes.items():
            nodes[name] = _both(node, seen.get(name))
    routers = tuple(
        RouterSeen(url, starts.get(url, 0), status is not None and model in status["routable"])
        for url, status in statuses.items()
    )
    return MeshSeen(tuple(nodes.values()), routers)


def busy(statuses: Statuses, metrics: Mapping[str, Mapping[Sample, float]]) -> list[str]:
    """What is not at rest, in words; empty when everything is."""
    found = []
    for url, status in statuses.items():
        if status is None:
            found.append(f"{url} does not answer")
            continue
        if status["in_flight"]:
            found.append(f"{url}: {status['in_flight']} requests in flight")
        if reserved := metrics.get(url, {}).get((RESERVATIONS, ()), 0.0):
            found.append(f"{url}: {reserved:.0f} reservations")
        for node in status["nodes"]:
            for engine in node["engines"]:
                found += _engine_busy(f"{node['name']} {engine['model']}", engine)
    return list(dict.fromkeys(found))


def _engine_busy(name: str, engine: Mapping[str, Any]) -> list[str]:
    found = [f"{name}: {engine[count]} {count}" for count in _COUNTS if engine[count]]
    held = engine["total_blocks"] - engine["free_blocks"] - engine["cached_blocks"]
    if held:
        found.append(f"{name}: {held} blocks held")
    if not engine["ready"]:
        found.append(f"{name}: not ready")
    return found


def _node(said: Mapping[str, Any], model: str) -> NodeSeen:
    engines = [engine for engine in said["engines"] if engine["model"] == model]
    ready = said["link"] == "up" and not said["draining"] and bool(engines)
    return NodeSeen(
        name=said["name"],
        site=said["site"],
        roles=frozenset(said["roles"]),
        models=frozenset(offer["name"] for offer in said["models"]),
        incarnation=said["incarnation"] or "",
        ready=ready and all(engine["ready"] for engine in engines),
    )


def _gone(node: NodeSeen) -> NodeSeen:
    """A node of which nobody has spoken yet."""
    return NodeSeen(node.name, node.site, node.roles, node.models, "", True)


def _both(node: NodeSeen, seen: NodeSeen | None) -> NodeSeen:
    """Ready is who is ready for every router; the rest is as the newest word has it."""
    if seen is None:
        return NodeSeen(node.name, node.site, node.roles, node.models, node.incarnation, False)
    return NodeSeen(
        node.name,
        seen.site,
        seen.roles or node.roles,
        seen.models or node.models,
        seen.incarnation or node.incarnation,
        node.ready and seen.ready,
    )
