"""What a topology asks of its nodes, as tables and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from popmesh.render.models import size
from popmesh.render.words import name_column
from topology.planner import MeshPlan, NodePlan, PlacedModel
from topology.reading.key_lines import KeyLines
from topology.rollout import Fetch

MAX_PEERS = 3
"""Peers named in a cell; JSON has all of them."""

MAX_LINKS = 20
"""Links shown, busiest first; JSON has all of them."""


def plan_view(plan: MeshPlan, lines: KeyLines) -> Group:
    """Nodes with their models, how these get there, what the links carry, and the problems."""
    parts: list[RenderableType] = [_nodes(plan)]
    if plan.fetches:
        parts.append(_ways(plan))
    if plan.links:
        parts.append(_links(plan))
    for problem in plan.problems:
        text = f"{lines.where(problem.keys)}: {problem.message} ({problem.suggestion})"
        parts.append(Text(text, style="red"))
    if not plan.problems:
        parts.append(Text("Everything fits."))
    return Group(*parts)


def _nodes(plan: MeshPlan) -> Table:
    table = Table(
        name_column("Node"),
        name_column("Model"),
        Column("At start", no_wrap=True),
        Column("Disk", justify="right", no_wrap=True),
        Column("Memory", justify="right", no_wrap=True),
        Column("Room for KV", justify="right", no_wrap=True),
        title="What each node holds when its doors open",
        title_justify="left",
    )
    for node in plan.nodes:
        for at, model in enumerate(node.models):
            table.add_row(
                node.node if at == 0 else "",
                model.model,
                _state(model),
                _size(model.disk_bytes),
                _size(model.memory_bytes),
                "" if model.room_tokens is None else f"+{model.room_tokens} tokens",
            )
        table.add_row(
            "",
            "",
            Text("in use", style="bold"),
            _of(node.disk_bytes, node.disk_budget),
            _of(node.memory_bytes, node.memory_budget),
            _left(node),
            end_section=True,
        )
    return table


def _state(model: PlacedModel) -> str:
    if model.is_warm:
        return "warm, pinned" if model.is_pinned else "warm"
    return "on disk" if model.is_on_disk else "absent"


def _size(nbytes: int | None) -> str:
    return "?" if nbytes is None else size(nbytes)


def _of(used: int, budget: int | None) -> str:
    return size(used) if budget is None else f"{size(used)}\nof {size(budget)}"


def _left(node: NodePlan) -> str:
    if node.memory_budget is None:
        return ""
    return f"{size(max(0, node.memory_budget - node.memory_bytes))} left"


def _ways(plan: MeshPlan) -> Table:
    table = Table(
        name_column("Node"),
        name_column("Model"),
        name_column("Fetched from"),
        Column("Time", justify="right", no_wrap=True),
        title="How models come to empty disks",
        title_justify="left",
    )
    for fetch in plan.fetches:
        table.add_row(fetch.node, fetch.model, _givers(fetch), _time(fetch.seconds))
    return table


def _givers(fetch: Fetch) -> str:
    if not fetch.shares:
        return "origin"
    names = [f"{share.giver} ({share.site})" for share in fetch.shares[:MAX_PEERS]]
    more = len(fetch.shares) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _links(plan: MeshPlan) -> Table:
    shown = plan.links[:MAX_LINKS]
    more = len(plan.links) - len(shown)
    table = Table(
        name_column("Link"),
        Column("Bytes", justify="right"),
        Column("Time alone", justify="right"),
        title="What that sends between sites",
        title_justify="left",
        caption=f"and {more} links more" if more else None,
    )
    for use in shown:
        table.add_row(f"{use.giver} → {use.taker}", size(use.nbytes), _time(use.seconds))
    return table


def plan_json(plan: MeshPlan, lines: KeyLines) -> dict[str, Any]:
    """For programs: the plan as it is, with the place of each problem in the file."""
    found = asdict(plan)
    found["problems"] = [
        {
            "where": lines.where(problem.keys),
            "message": problem.message,
            "suggestion": problem.suggestion,
            "over_bytes": problem.over_bytes,
        }
        for problem in plan.problems
    ]
    found["fits"] = not plan.problems
    return found
