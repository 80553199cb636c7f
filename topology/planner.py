"""Foretells a mesh at rest: what lies on each node's disk, what is in its memory when its doors
open, and what does not fit, by how much.

Pure: sizes are arguments, whoever knows a store brings them. The arithmetic is the nodes' own
(``topology.budget``), so what is foretold is what they do. What demand then moves is not foretold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from topology.budget import (
    GB,
    ModelSize,
    by_precedence,
    disk_budget,
    first_fit,
    memory_budget,
    warm_at_start,
)
from topology.model import Node, Topology
from topology.rollout import Fetch, LinkUse, Paths, link_use, spread


@dataclass(frozen=True, slots=True)
class PlanProblem:
    """What cannot be as the file says.

    ``keys`` lead to the place in the file, outermost first (``("nodes", "fra-1", "disk_gb")``);
    ``over_bytes`` is by how much it does not fit, 0 where that is not the matter.
    """

    keys: tuple[str, ...]
    message: str
    suggestion: str
    over_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """One model that a node lists. Sizes are None where nobody knows them.

    ``room_tokens``: how many more tokens its KV cache could hold if all memory that is left went to
    it; None unless it is warm under a ``memory_gb`` and its size per token is known. ``peers``:
    nodes with other disks that list it too, nearest first.
    """

    model: str
    is_pinned: bool
    is_on_disk: bool
    is_warm: bool
    disk_bytes: int | None
    memory_bytes: int | None
    room_tokens: int | None
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One node. Budgets are None where the file sets none.

    ``disk_bytes`` is what lies on its disk (also for other nodes that share it), ``memory_bytes``
    what is warm when the doors open.
    """

    node: str
    site: str
    models: tuple[PlacedModel, ...]
    disk_bytes: int
    disk_budget: int | None
    memory_bytes: int
    memory_budget: int | None


@dataclass(frozen=True, slots=True)
class MeshPlan:
    """Everything, in the file's order; ``fetches`` in the order in which they happen."""

    nodes: tuple[NodePlan, ...]
    fetches: tuple[Fetch, ...]
    links: tuple[LinkUse, ...]
    problems: tuple[PlanProblem, ...]


def plan_mesh(
    topology: Topology, sizes: Mapping[str, ModelSize], why_unknown: Mapping[str, str]
) -> MeshPlan:
    """Plan ``topology`` with ``sizes`` by model's name; a served model without one is a problem,
    and ``why_unknown`` may have the reason."""
    problems = _unknown_sizes(topology, sizes, why_unknown)
    disks = _disks(topology)
    on_disk: dict[str, Sequence[str]] = {}
    for nodes in disks:
        kept = _fill_disk(nodes, sizes, problems)
        on_disk |= {node.name: kept for node in nodes}
    paths = Paths(topology)
    plans = [
        _plan_node(paths, node, on_disk, disks, sizes, problems) for node in topology.nodes.values()
    ]
    fetches: list[Fetch] = []
    for model, size in sizes.items():
        takers = [nodes[0] for nodes in disks if model in on_disk[nodes[0].name]]
        fetches += spread(paths, model, size.disk_bytes, takers)
    return MeshPlan(tuple(plans), tuple(fetches), tuple(link_use(paths, fetches)), tuple(problems))


def _unknown_sizes(
    topology: Topology, sizes: Mapping[str, ModelSize], why_unknown: Mapping[str, str]
) -> list[PlanProblem]:
    served = {model for node in topology.nodes.values() for model in node.models}
    return [
        PlanProblem(
            ("models", model),
            f"the size of {model!r} is not known"
            + (f": {why_unknown[model]}" if model in why_unknown else ""),
            f"add it with 'popmesh model add', or give --size {model}=BYTES",
        )
        for model in topology.models
        if model in served and model not in sizes
    ]


def _disks(topology: Topology) -> list[list[Node]]:
    """Nodes by the disk they share: the same store on the same host."""
    disks: dict[tuple[str, str], list[Node]] = {}
    for node in topology.nodes.values():
        disks.setdefault((node.mesh.host, str(node.store)), []).append(node)
    return list(disks.values())


def _fill_disk(
    nodes: Sequence[Node], sizes: Mapping[str, ModelSize], problems: list[PlanProblem]
) -> list[str]:
    """What lies on a disk: models that are pinned somewhere, then the others, as far as they fit.

    Nodes that share a disk are bounded by the smallest of their bounds.
    """
    listed = list(dict.fromkeys(model for node in nodes for model in node.models))
    pinned = {model for node in nodes for model in node.pinned}
    nbytes = {model: sizes[model].disk_bytes for model in listed if model in sizes}
    bounds = {node.name: bound for node in nodes if (bound := disk_budget(node)) is not None}
    strictest = min(bounds, key=lambda name: bounds[name], default=None)
    budget = None if strictest is None else bounds[strictest]
    kept = first_fit(by_precedence(listed, pinned), nbytes, budget)
    if strictest is not None and budget is not None:
        over = sum(nbytes.values()) - budget
        if over > 0:
            left_out = ", ".join(model for model in nbytes if model not in kept)
            problems.append(
                PlanProblem(
                    ("nodes", strictest, "disk_gb"),
                    f"the models of {strictest} take {_gb(sum(nbytes.values()))} of its disk, "
                    f"{_gb(over)} more than disk_gb; not on it: {left_out}",
                    "raise disk_gb, or list fewer models",
                    over,
                )
            )
    return kept


def _plan_node(
    paths: Paths,
    node: Node,
    on_disk: Mapping[str, Sequence[str]],
    disks: Sequence[Sequence[Node]],
    sizes: Mapping[str, ModelSize],
    problems: list[PlanProblem],
) -> NodePlan:
    known = [model for model in node.models if model in sizes]
    memory = {model: sizes[model].memory_bytes(node) for model in known}
    budget = memory_budget(node)
    if budget is not None:
        problems += _memory_problems(node, memory, budget)
    kept = on_disk[node.name]
    warm = warm_at_start(node, {model: memory[model] for model in known if model in kept})
    used = sum(memory[model] for model in warm)

    def room(model: str) -> int | None:
        if budget is None or model not in warm or not sizes[model].kv_bytes_per_token:
            return None
        return (budget - used) // sizes[model].kv_bytes_per_token

    return NodePlan(
        node=node.name,
        site=node.site,
        models=tuple(
            PlacedModel(
                model=model,
                is_pinned=model in node.pinned,
                is_on_disk=model in kept,
                is_warm=model in warm,
                disk_bytes=sizes[model].disk_bytes if model in sizes else None,
                memory_bytes=memory.get(model),
                room_tokens=room(model),
                peers=_peers(paths, node, model, on_disk, disks),
            )
            for model in node.models
        ),
        disk_bytes=sum(sizes[model].disk_bytes for model in kept),
        disk_budget=disk_budget(node),
        memory_bytes=used,
        memory_budget=budget,
    )


def _memory_problems(node: Node, memory: Mapping[str, int], budget: int) -> list[PlanProblem]:
    """What can never be in memory: pinned models together, or another one beside them."""
    pinned = sum(memory[model] for model in memory if model in node.pinned)
    if pinned > budget:
        return [
            PlanProblem(
                ("nodes", node.name, "pinned"),
                f"the pinned models of {node.name} take {_gb(pinned)} of memory, "
                f"{_gb(pinned - budget)} more than memory_gb",
                "pin fewer models, raise memory_gb, or lower kv_tokens",
                pinned - budget,
            )
        ]
    beside = f" beside {_gb(pinned)} of pinned models" if pinned else ""
    return [
        PlanProblem(
            ("nodes", node.name, "memory_gb"),
            f"{model!r} can never be loaded on {node.name}: it takes {_gb(nbytes)} of memory"
            f"{beside}, {_gb(pinned + nbytes - budget)} more than memory_gb",
            "raise memory_gb, lower kv_tokens, or list it elsewhere",
            pinned + nbytes - budget,
        )
        for model, nbytes in memory.items()
        if model not in node.pinned and pinned + nbytes > budget
    ]


def _peers(
    paths: Paths,
    node: Node,
    model: str,
    on_disk: Mapping[str, Sequence[str]],
    disks: Sequence[Sequence[Node]],
) -> tuple[str, ...]:
    givers = [
        nodes[0]
        for nodes in disks
        if all(other.name != node.name for other in nodes) and model in on_disk[nodes[0].name]
    ]
    givers.sort(key=lambda giver: paths.rtt_ms(node.site, giver.site))
    return tuple(giver.name for giver in givers)


def _gb(nbytes: int) -> str:
    return f"{nbytes / GB:.3f} GB"
