"""Reports of cold starts that nobody has held, for tests of what is made of them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from aiohttp import web

from pop_node.drills.pages import Dropped, Holder
from pop_node.drills.report import SCHEMA, Cold, ColdStartReport, Phase
from popmesh.drill.cold_start import report as reports
from popmesh.drill.cold_start.report import ColdStartDrill, RouterSaid, Run, make_run
from popmesh.drill.statistics import quantiles


def node_report(node: str = "p1", total_s: float = 1.0, **changes: Any) -> ColdStartReport:
    """What a node says: half its time is imports, the other half reads 100 MB and warms up."""
    pages = Dropped(3, 1000, 900, 0, 0, [], [], 0, [])
    libraries = Dropped(9, 5000, 5000, 700, 1, [], [Holder(77, "popmesh", 1)], 0, [])
    half = total_s / 2
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "node": node,
        "model": "fake",
        "source": "disk",
        "bundle": "b00d1e",
        "bundle_bytes": 100_000_000,
        "cold": Cold(1000, 0, 5000, 700, pages, libraries),
        "down_s": 0.2,
        "drop_s": 0.1,
        "phases": [
            Phase("process_start", 0.0, 0.1 * half),
            Phase("imports", 0.1 * half, half),
            Phase("load", half, 1.8 * half),
            Phase("read", half, 1.8 * half, 100_000_000),
            Phase("first_token", 1.8 * half, 1.9 * half),
            Phase("warm", 1.8 * half, 1.95 * half),
        ],
        "total_s": total_s,
        "said_s": total_s,
        "load_average": 1.5,
    }
    return ColdStartReport(**(values | changes))


def router_said(node: str = "p1", total_s: float = 1.0, **changes: Any) -> RouterSaid:
    """What a router makes of it: it sees the node ready a moment later."""
    told = msgspec.to_builtins(node_report(node, total_s, **changes))
    return msgspec.convert(told | {"seen_ready_s": total_s + 0.05, "wall_s": 2.0}, RouterSaid)


def runs_of(*times_s: float, node: str = "p1") -> list[Run]:
    """Runs of these lengths, until the node is ready."""
    return [make_run(number, router_said(node, s)) for number, s in enumerate(times_s, 1)]


def drill_of(runs: list[Run], **changes: Any) -> ColdStartDrill:
    """A drill that was passed."""
    values: dict[str, Any] = {
        "schema": reports.SCHEMA,
        "started": "2026-01-02T03:04:05+00:00",
        "mesh": "fakemesh",
        "router": "http://127.0.0.1:1",
        "model": "fake",
        "nodes": sorted({run.node for run in runs}),
        "source": "disk",
        "libraries": True,
        "whole": False,
        "budget_s": None,
        "passed": True,
        "problems": [],
        "times": quantiles(run.time_s for run in runs),
        "regressions": [],
        "threshold": "",
        "runs": runs,
    }
    return ColdStartDrill(**(values | changes))


def answer(node: str, total_s: float) -> web.Response:
    """HTTP 200 with a report."""
    body = msgspec.json.encode(router_said(node, total_s))
    return web.Response(body=body, content_type="application/json")


def failure(status: int, code: str, message: str) -> web.Response:
    """HTTP with a typed error."""
    body = json.dumps({"error": {"message": message, "code": code}})
    return web.Response(text=body, status=status, content_type="application/json")
