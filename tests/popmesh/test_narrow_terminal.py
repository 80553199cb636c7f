"""What operators look at fits 80 columns: long names take more lines, they hide no figure."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console

from pop_node.store.facts import Row
from pop_node.store.names import NameEntry
from popmesh.client import ClientPlace, Plan, Reason, Rejected, Route
from popmesh.drill.report import FaultRow
from popmesh.render.cold_start import cold_start_view
from popmesh.render.drill_timeline import timeline
from popmesh.render.models import models_table
from popmesh.render.routes import plan_view
from popmesh.render.status import status_view
from popmesh.render.words import counted
from tests.popmesh.cold_start_world import drill_of, runs_of

NODE = "frankfurt-am-main-rack-17-unit-42"
MODEL = "my-organisation-smollm2-135m-instruct-finetuned-2026-11"


def columns_of(view: Any, width: int = 80) -> list[str]:
    """The text, column by column, whatever lines its cells take."""
    screen = io.StringIO()
    Console(file=screen, width=width).print(view)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in screen.getvalue(), screen.getvalue()
    found: list[str] = []
    for line in lines:
        cells = re.split("[│┃]", line)[1:-1]
        found += [""] * (len(cells) - len(found))
        for at, cell in enumerate(cells):
            found[at] += cell.strip()
    return found


def test_the_status_of_long_names_keeps_every_figure():
    engine = {"model": MODEL, "ready": True, "running": 11, "waiting": 22, "free_blocks": 1000}
    engine |= {"cached_blocks": 24, "total_blocks": 2048, "prefill_tokens_per_s": 987.0}
    engine |= {"decode_step_ms": 65.0, "warmth": "warm", "eta_ms": 0, "warm_refused": ""}
    node = {"name": NODE, "site": "fra", "roles": ["decode", "prefill"], "link": "up"}
    node |= {"draining": False, "rtt_ms": 123.4, "rtt_measured": True, "link_error": None}
    node |= {"engines": [engine], "memory_bytes": 8 * 10**9, "memory_used_bytes": 3 * 10**9}
    kept = {"model": MODEL, "region": "eu", "per_min": 3.5, "nodes": [NODE], "kept_s": 299.0}
    status = {"router": "r", "site": "fra", "mesh": "m", "running": 0, "registry_age_s": 1.0}
    status |= {"routable": [MODEL], "nodes": [node], "placement": [kept]}
    columns = columns_of(status_view(status))
    for at, figures in enumerate(
        [[NODE], [MODEL], ["ready"], ["11"], ["22"], ["3.0/8.0", "1024/2048"], ["987"], ["65"]]
    ):
        for figure in figures:
            assert figure in columns[at], (at, figure, columns)
    assert "299" in columns[4]


def test_the_models_of_a_store(tmp_path):
    entry = NameEntry("b" * 64, "pypi:a-source-that-is-quite-long", "bfloat16")
    row = Row(MODEL, entry, None, "", 181_000_000, 0, True)
    columns = columns_of(models_table([row], 1e6, 80))
    assert columns[0] == f"Name{MODEL}"
    assert columns[1:4] == ["Size181 MB", "Dtypebfloat16", "Stored-"]
    assert (columns[4], columns[6]) == ("Stateloaded,unusable", "Digest-")


def test_candidates_and_who_was_left_out():
    reasons = [Reason("decode", 0.96, "as it is")]
    routes = [Route(NODE, f"{NODE}-{n}", "fra", "lhr", 1.0, reasons) for n in range(4)]
    client = ClientPlace(50.0, 8.0, "router")
    plan = Plan(client, 12, routes[0], routes[1:], [Rejected(NODE, "it drains")])
    columns = columns_of(plan_view(plan))
    assert [column[: len(NODE)] for column in columns[1:5]] == [NODE] * 4


def test_runs_of_a_cold_start():
    screen = columns_of(cold_start_view(drill_of(runs_of(1.0, node=NODE))))
    assert screen[1].startswith(f"Node{NODE}")


def test_counts_in_words():
    assert [counted(n, "router") for n in (0, 1, 2)] == ["0 routers", "1 router", "2 routers"]


def test_faults_of_one_moment_share_a_label():
    faults = [
        FaultRow(n, "kill-agent", f"lhr-{n}", "any", at, 3.0)
        for n, at in [(1, 2.0), (2, 2.0), (3, 9.0)]
    ]
    labels = re.findall(r'class="number"[^>]*>([^<]*)<', timeline(faults, [], 20.0))
    assert labels == ["1, 2", "3"]
