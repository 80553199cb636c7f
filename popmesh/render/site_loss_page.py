"""A site-loss drill as one HTML page."""

from __future__ import annotations

from html import escape

from popmesh.drill.site_loss.report import SiteLossReport
from popmesh.render.drill import cells
from popmesh.render.drill_page import KEYS, TIMELINE_STYLE, answers_listed
from popmesh.render.drill_timeline import timeline
from popmesh.render.page import items, keys, page, table
from popmesh.render.site_loss import HEAD, figures, sentences


def site_loss_page(report: SiteLossReport) -> str:
    """The whole page as text."""
    word, kind = ("passed", "passed") if report.passed else ("not passed", "failed")
    title = f"Loss of site {report.site}"
    told = (
        f"{report.started}, {report.duration_s:.0f} s; mesh {report.mesh}, model {report.model}; "
        f"{report.streams} clients at {', '.join(report.routers)}; seed {report.seed}."
    )
    rows = [
        (one.name, f"{one.end_at_s - one.start_at_s:.1f}", *figures(one))
        for one in report.stretches
    ]
    nodes = [
        (row.victim, "-" if row.after_s is None else f"{row.after_s:.1f}", row.problem)
        for row in report.faults
    ]
    body = [
        f"<h1>{escape(title)}: <span class={kind}>{word}</span></h1>",
        *(f"<p>{escape(text)}</p>" for text in [*sentences(report), told]),
        *items(report.problems, "failed"),
        "<h2>Timeline</h2>",
        f'<p class="soft">{keys(KEYS)}</p>',
        f'<div class="wide">{timeline(report.faults, report.answers, report.duration_s)}</div>',
        "<h2>Before, without it, and after</h2>",
        '<p class="soft">Answers by when they began, in seconds at the client; texts by when they '
        "came. Nodes that were ready and the room in their caches are those at the end.</p>",
        table(("", "length, s", *HEAD), rows, numbers=range(1, 12)),
        "<h2>Pauses</h2>",
        '<p class="soft">The longest wait of each answer that was hit, in seconds.</p>',
        table(("n", "p50", "p90", "p99", "max"), [cells(report.pauses)], numbers=range(5)),
        "<h2>Nodes</h2>",
        table(("node", "struck until ready, s", ""), nodes, numbers=(1,)),
        "<h2>Answers that were not right</h2>",
        answers_listed(report.answers),
    ]
    return page(f"{title}: {word}", TIMELINE_STYLE, body)
