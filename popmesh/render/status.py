"""A router's status as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from popmesh.render.words import name_column


def status_view(status: dict[str, Any]) -> Group:
    """The router, its nodes with link and load, and what placement keeps. ``status`` is the JSON of
    ``/popmesh/status``; a router of an older version leaves out what it does not know.
    """
    age_s = status["registry_age_s"]
    registry = "registry not heard yet" if age_s is None else f"registry heard {age_s:.0f} s ago"
    head = (
        f"Router {status['router']} at {status['site']}, mesh {status['mesh']}: "
        f"{status['running']} requests running; {registry}"
    )
    routable = ", ".join(status["routable"]) or "none"
    budgets = any(node.get("memory_bytes") for node in status["nodes"])
    nodes = Table(
        name_column("Node"),
        *("Site", "Roles", "Link"),
        Column("RTT, ms", justify="right"),
        *([Column("Models, GB", justify="right", no_wrap=True)] if budgets else []),
    )
    engines = Table(
        *(name_column("Node"), name_column("Engine"), Column("State", no_wrap=True)),
        *(Column(name, no_wrap=True, justify="right") for name in ("Run", "Wait", "Free blocks")),
        *(Column(name, justify="right") for name in ("Prefill,\ntok/s", "Step,\nms")),
    )
    for node in sorted(status["nodes"], key=lambda node: (node["site"], node["name"])):
        link = "draining" if node["draining"] else node["link"]
        if node.get("link_error") and link != "up":
            link = f"{link}: {node['link_error']}"
        rtt = f"{'' if node['rtt_measured'] else '~'}{node['rtt_ms']:.1f}"
        cells = [node["name"], node["site"], ", ".join(node["roles"]), link, rtt]
        nodes.add_row(*cells, *([_memory(node)] if budgets else []))
        for engine in node["engines"]:
            engines.add_row(node["name"], *_engine_cells(engine))
    parts: list[Text | Table] = [
        Text(head),
        nodes,
        engines,
        Text(f"Models with a route now: {routable}"),
    ]
    parts += [
        Text(f"{node['name']} cannot load {engine['model']}: {engine['warm_refused']}")
        for node in status["nodes"]
        for engine in node["engines"]
        if engine.get("warm_refused")
    ]
    guessed = [
        f"{node['name']} {engine['model']} {_guessed_right(engine)}"
        for node in status["nodes"]
        for engine in node["engines"]
        if engine.get("drafted_tokens")
    ]
    if guessed:
        parts.append(Text(f"Tokens guessed ahead: {', '.join(sorted(guessed))}"))
    kept = [decision for decision in status.get("placement", []) if decision["nodes"]]
    if kept:
        parts.append(_placement(kept))
    return Group(*parts)


def _placement(decisions: list[dict[str, Any]]) -> Table:
    """Models that are in memory because a region asks for them."""
    table = Table(
        *(name_column("Model"), "Region", Column("Asked/min", justify="right")),
        *(name_column("Kept by"), "For, s"),
    )
    for decision in decisions:
        kept_by, kept_s = ", ".join(decision["nodes"]), f"{decision['kept_s']:.0f}"
        asked = f"{decision['per_min']:.1f}"
        table.add_row(decision["model"], decision["region"], asked, kept_by, kept_s)
    return table


def _memory(node: dict[str, Any]) -> str:
    """Taken of the node's budget for models; a dash where all models stay."""
    if not node.get("memory_bytes"):
        return "-"
    return f"{node['memory_used_bytes'] / 1e9:.1f}/{node['memory_bytes'] / 1e9:.1f}"


def _state(engine: dict[str, Any]) -> str:
    """Where the model is, and how long until it could answer."""
    warmth, eta_ms = engine.get("warmth", ""), engine.get("eta_ms", 0)
    if engine["ready"]:
        return "ready"
    if warmth in ("", "warm"):
        return "not ready"
    if engine["warm_refused"]:
        return f"{warmth}, cannot load"
    return f"{warmth}, {eta_ms / 1e3:.1f} s" if eta_ms else str(warmth)


def _engine_cells(engine: dict[str, Any]) -> list[str]:
    free = engine["free_blocks"] + engine["cached_blocks"]
    return [
        engine["model"],
        _state(engine),
        str(engine["running"]),
        str(engine["waiting"]),
        f"{free}/{engine['total_blocks']}",
        _measured(engine["prefill_tokens_per_s"]),
        _measured(engine["decode_step_ms"]),
    ]


def _guessed_right(engine: dict[str, Any]) -> str:
    """Accepted tokens / drafted tokens, since the engine began."""
    drafted = engine["drafted_tokens"]
    return f"{engine['accepted_tokens'] / drafted:.0%} of {drafted} right"


def _measured(value: float) -> str:
    return f"{value:.0f}" if value else "-"
