"""A router's status as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text


def status_view(status: dict[str, Any]) -> Group:
    """The router, then its nodes with link and load. ``status`` is ``/popmesh/status``'s JSON."""
    age_s = status["registry_age_s"]
    registry = "registry not heard yet" if age_s is None else f"registry heard {age_s:.0f} s ago"
    head = (
        f"Router {status['router']} at {status['site']}, mesh {status['mesh']}: "
        f"{status['running']} requests running; {registry}"
    )
    routable = ", ".join(status["routable"]) or "none"
    nodes = Table("Node", "Site", "Roles", "Link", Column("RTT, ms", justify="right"))
    engines = Table(
        *(Column(name, no_wrap=True) for name in ("Node", "Engine", "State")),
        *(Column(name, no_wrap=True, justify="right") for name in ("Run", "Wait", "Free blocks")),
        *(Column(name, justify="right") for name in ("Prefill, tok/s", "Step, ms")),
    )
    for node in sorted(status["nodes"], key=lambda node: (node["site"], node["name"])):
        link = "draining" if node["draining"] else node["link"]
        if node.get("link_error") and link != "up":
            link = f"{link}: {node['link_error']}"
        rtt = f"{'' if node['rtt_measured'] else '~'}{node['rtt_ms']:.1f}"
        nodes.add_row(node["name"], node["site"], ", ".join(node["roles"]), link, rtt)
        for engine in node["engines"]:
            engines.add_row(node["name"], *_engine_cells(engine))
    return Group(Text(head), nodes, engines, Text(f"Models with a route now: {routable}"))


def _engine_cells(engine: dict[str, Any]) -> list[str]:
    free = engine["free_blocks"] + engine["cached_blocks"]
    return [
        engine["model"],
        "ready" if engine["ready"] else "not ready",
        str(engine["running"]),
        str(engine["waiting"]),
        f"{free}/{engine['total_blocks']}",
        _measured(engine["prefill_tokens_per_s"]),
        _measured(engine["decode_step_ms"]),
    ]


def _measured(value: float) -> str:
    return f"{value:.0f}" if value else "-"
