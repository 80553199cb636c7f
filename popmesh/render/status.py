"""A router's status as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


def status_view(status: dict[str, Any]) -> Group:
    """The router, then its nodes with link and load. ``status`` is ``/popmesh/status``'s JSON."""
    age_s, error = status.get("directory_age_s"), status.get("directory_error")
    directory = (
        f"registry heard {age_s:.0f} s ago" if age_s is not None else "registry not heard yet"
    )
    head = (
        f"Router {status['router']} at {status['site']}, mesh {status['mesh']}: "
        f"{status['running']} requests running; {directory}" + (f" ({error})" if error else "")
    )
    routable = ", ".join(status["routable"]) or "none"
    nodes = Table(
        "Node", "Site", "Roles", "Link", "RTT, ms", "Model", "Engine", "Running", "Waiting",
        "Free blocks", "Prefill, tok/s", "Step, ms",
    )  # fmt: skip
    for column in ("RTT, ms", "Running", "Waiting", "Free blocks", "Prefill, tok/s", "Step, ms"):
        next(c for c in nodes.columns if c.header == column).justify = "right"
    for node in status["nodes"]:
        _add_node(nodes, node)
    return Group(Text(head), nodes, Text(f"Models with a route now: {routable}"))


def _add_node(table: Table, node: dict[str, Any]) -> None:
    link = "draining" if node["draining"] else node["link"]
    if node.get("link_error") and link != "up":
        link = f"{link}: {node['link_error']}"
    rtt = f"{'' if node['rtt_measured'] else '~'}{node['rtt_ms']:.1f}"
    first = [node["name"], node["site"], ", ".join(node["roles"]), link, rtt]
    if not node["engines"]:
        table.add_row(*first)
    for engine in node["engines"]:
        free = engine["free_blocks"] + engine["cached_blocks"]
        table.add_row(
            *first,
            engine["model"],
            "ready" if engine["ready"] else "not ready",
            str(engine["running"]),
            str(engine["waiting"]),
            f"{free}/{engine['total_blocks']}",
            _measured(engine["prefill_tokens_per_s"]),
            _measured(engine["decode_step_ms"]),
        )
        first = [""] * len(first)


def _measured(value: float) -> str:
    return f"{value:.0f}" if value else "-"
