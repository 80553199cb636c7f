"""A cold-start drill as one HTML page, with a waterfall of each run."""

from __future__ import annotations

from html import escape

from popmesh.drill.cold_start.history import THRESHOLD
from popmesh.drill.cold_start.report import ColdStartDrill
from popmesh.render.cold_start import coldness, facts, rate_of
from popmesh.render.models import size
from popmesh.render.page import items, keys, page, table
from popmesh.render.waterfall import KINDS, waterfall

_STYLE = "\n".join(
    [
        ".key { display: inline-block; width: 14px; height: 10px; margin: 0 4px 0 14px; }",
        "h3 { font-size: 15px; margin: 20px 0 4px; } .label { fill: var(--ink); font-size: 12px; }",
        *(f".phase.{kind} {{ fill: var({color}); }}" for kind, color, _ in KINDS),
    ]
)


def cold_start_page(report: ColdStartDrill) -> str:
    """The whole page as text."""
    word, kind = ("passed", "passed") if report.passed else ("not passed", "failed")
    slower = [row.words() for row in report.regressions]
    told = f"{report.started}, through {report.router}."
    body = [
        f"<h1>Cold start of {escape(report.model)}: <span class={kind}>{word}</span></h1>",
        *(f"<p>{escape(fact)}</p>" for fact in [*facts(report), told]),
        *items(report.problems, "failed"),
        "<h2>Runs</h2>",
        '<p class="soft">Seconds since the new process was started. Before that the model was '
        "taken down, its pages were dropped, and the kernel was asked (mincore) whether any was "
        "left.</p>",
        _runs(report),
        "<h2>Slower than before</h2>",
        f'<p class="soft">Flagged: {escape(THRESHOLD)}.</p>',
        *(items(slower, "failed") or ["<p>None.</p>"]),
        "<h2>Where the time went</h2>",
        f'<p class="soft">{keys((color, text) for _, color, text in KINDS)}</p>',
        *_waterfalls(report),
        '<p class="soft">What a hypervisor or a drive caches behind the kernel can be neither seen '
        "nor dropped from a node.</p>",
    ]
    return page(f"Cold start of {report.model}: {word}", _STYLE, body)


def _runs(report: ColdStartDrill) -> str:
    rows = []
    for run in report.runs:
        rate = run.bytes_per_s()
        rows.append(
            (
                str(run.number),
                run.node,
                f"{run.ready_s:.3f}",
                "-" if run.seen_ready_s is None else f"{run.seen_ready_s:.3f}",
                f"{run.down_s:.3f}",
                f"{run.drop_s:.3f}",
                "-" if rate is None else f"{size(round(rate))}/s",
                f"{run.load_average:.1f}",
                coldness(run),
            )
        )
    head = ("run", "node", "ready", "in the plan", "to end it", "to drop pages", "rate")
    return table((*head, "load average", ""), rows, numbers=(0, *range(2, 8)), prose=(8,))


def _waterfalls(report: ColdStartDrill) -> list[str]:
    longest_s = max((run.time_s for run in report.runs), default=0.0)
    parts = []
    for run in report.runs:
        rows = [
            (
                phase.name,
                f"{phase.start_s:.3f}",
                f"{phase.end_s - phase.start_s:.3f}",
                size(phase.nbytes) if phase.nbytes else "",
                rate_of(phase),
            )
            for phase in run.phases
        ]
        parts += [
            f"<h3>Run {run.number}, {escape(run.node)}: {run.time_s:.3f} s</h3>",
            f'<div class="wide">{waterfall(run, longest_s)}</div>',
            "<details><summary>In figures</summary>",
            table(("phase", "from, s", "length, s", "bytes", "rate"), rows, numbers=range(1, 5)),
            "</details>",
        ]
    return parts
