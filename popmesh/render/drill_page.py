"""A drill's report as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from popmesh.drill.report import Report, StreamRow
from popmesh.render.drill import cells, waits
from popmesh.render.drill_timeline import timeline
from popmesh.render.page import items, keys, page, table

MAX_ANSWERS_LISTED = 200

TIMELINE_STYLE = """
.answer.right { fill: var(--right); } .answer.differs { fill: var(--differs); }
.answer.bad { fill: var(--bad); } .gap { fill: var(--gap); } .gap.hit { fill: var(--hit); }
.fault { fill: var(--fault); fill-opacity: .35; } .fault.bad { fill: var(--bad); }
.blow { stroke: var(--fault); stroke-dasharray: 3 3; stroke-opacity: .7; }
.number { fill: var(--ink); font-size: 10px; }
.key { display: inline-block; width: 14px; height: 10px; margin: 0 4px 0 14px; }
"""

KEYS = (
    ("--right", "answer as it should be"),
    ("--gap", "wait of a quarter second or more"),
    ("--hit", "pause by a fault"),
    ("--differs", "differs"),
    ("--bad", "wrong, cut or hanging"),
    ("--fault", "victim out"),
)


def drill_page(report: Report) -> str:
    """The whole page as text."""
    word, kind = ("passed", "passed") if report.passed else ("not passed", "failed")
    verdicts = ", ".join(f"{count} {name}" for name, count in sorted(report.verdicts.items()))
    calm = ", ".join(f"{count} {name}" for name, count in sorted(report.calm_verdicts.items()))
    recovered = ", ".join(f"{count} by {name}" for name, count in report.recoveries.items())
    done = sum(fault.done for fault in report.faults)
    facts = [
        f"{report.started}, {report.duration_s:.0f} s; model {report.model}; {report.streams} "
        f"clients at {', '.join(report.routers)}; seed {report.seed}",
        f"{done} faults done. Answers under them: {verdicts or 'none'}; {report.tokens} tokens.",
        f"Undisturbed: {calm}. Answers have to be exact: {'yes' if report.exact else 'no'}.",
        f"Recoveries: {recovered or 'none counted'}. Resumed by clients: {report.resumed}.",
    ]
    drawn = timeline(report.faults, report.answers, report.duration_s)
    body = [
        f"<h1>Chaos drill of {escape(report.mesh)}: <span class={kind}>{word}</span></h1>",
        *(f"<p>{escape(fact)}</p>" for fact in facts),
        *items(report.problems, "failed"),
        "<h2>Timeline</h2>",
        f'<p class="soft">{keys(KEYS)}</p><div class="wide">{drawn}</div>',
        "<h2>Waits</h2>",
        '<p class="soft">Seconds, at the client. Quantiles by nearest rank. A pause is the longest '
        "wait of an answer that was hit, while a fault was there.</p>",
        table(
            ("", "n", "p50", "p90", "p99", "max"),
            [(name, *cells(figures)) for name, figures in waits(report)],
            numbers=range(1, 6),
        ),
        "<h2>Faults</h2>",
        _faults(report),
        "<h2>At rest, before and after</h2>",
        _rest(report),
        "<h2>Answers that were not right</h2>",
        answers_listed(report.answers),
    ]
    return page(f"Chaos drill of {report.mesh}: {word}", TIMELINE_STYLE, body)


def _faults(report: Report) -> str:
    rows = [
        (
            str(row.number),
            f"{row.at_s:.1f}",
            row.fault,
            row.victim,
            row.stage,
            "-" if row.after_s is None else f"{row.after_s:.1f}",
            str(row.touched),
            f"{row.longest_pause_s:.2f}" if row.touched else "-",
            row.problem if row.done else f"not done: {row.problem}",
        )
        for row in report.faults
    ]
    head = ("", "at, s", "fault", "victim", "aimed at", "out, s", "answers hit", "longest pause, s")
    return table((*head, ""), rows, numbers=(0, 1, 5, 6, 7))


def _rest(report: Report) -> str:
    rows = []
    for name in sorted(report.before.processes.keys() | report.after.processes.keys()):
        row = [name]
        for rest in (report.before, report.after):
            seen = rest.processes.get(name)
            row += (
                [str(seen.pid), str(seen.descriptors), f"{seen.resident_bytes / 1e6:.0f}"]
                if seen is not None
                else ["-", "-", "-"]
            )
        rows.append(tuple(row))
    busy = (
        "; ".join(report.after.busy) or "requests, transfers, streams, blocks, reservations: none"
    )
    text = f"<p>Held after the drill: {escape(busy)}.</p>"
    if not rows:
        return text
    head = ("process", "pid", "descriptors", "MB", "pid after", "descriptors after", "MB after")
    return text + table(head, rows, numbers=range(1, 7))


def answers_listed(answers: Sequence[StreamRow]) -> str:
    """Those that were not right, as a table."""
    bad = [row for row in answers if row.verdict != "right"]
    if not bad:
        return "<p>None.</p>"
    rows = [
        (f"{row.started_s:.1f}", str(row.client), row.request_id, row.verdict, row.detail)
        for row in bad[:MAX_ANSWERS_LISTED]
    ]
    more = len(bad) - len(rows)
    note = f"<p>And {more} more, in report.json.</p>" if more else ""
    return table(("at, s", "client", "request", "verdict", ""), rows, numbers=(0, 1)) + note
