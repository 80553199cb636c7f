"""A drill's report in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from popmesh.drill.report import FaultRow, Report
from popmesh.drill.statistics import Quantiles

MAX_PROBLEMS_SHOWN = 20


def drill_view(report: Report) -> Group:
    """Result, faults by kind, waits, and what is wrong."""
    answers = ", ".join(f"{count} {kind}" for kind, count in sorted(report.verdicts.items()))
    recovered = ", ".join(f"{count} {kind}" for kind, count in report.recoveries.items())
    parts: list[RenderableType] = [
        Text("Passed." if report.passed else "Not passed.", style=_style(report.passed)),
        Text(f"Answers under faults: {answers or 'none'}; {report.tokens} tokens"),
        Text(f"Recoveries: {recovered or 'none counted'}; resumed by clients: {report.resumed}"),
        _faults(report.faults),
        _waits(report),
    ]
    shown = report.problems[:MAX_PROBLEMS_SHOWN]
    parts += [Text(f"- {problem}", style="red") for problem in shown]
    if len(report.problems) > len(shown):
        parts.append(Text(f"- and {len(report.problems) - len(shown)} more"))
    for row in [row for row in report.answers if row.verdict != "right"][:MAX_PROBLEMS_SHOWN]:
        parts.append(Text(f"  {row.request_id or 'no id'}: {row.verdict}, {row.detail}"))
    return Group(*parts)


def _faults(faults: list[FaultRow]) -> Table:
    columns = ("Done", "Recovered", "Answers hit", "Longest pause, s")
    table = Table("Fault", *(Column(name, justify="right") for name in columns))
    for kind in dict.fromkeys(row.fault for row in faults):
        rows = [row for row in faults if row.fault == kind and row.done]
        back = sum(row.after_s is not None for row in rows)
        touched = sum(row.touched for row in rows)
        longest_s = max((row.longest_pause_s for row in rows if row.touched), default=None)
        pause = "-" if longest_s is None else f"{longest_s:.2f}"
        table.add_row(kind, str(len(rows)), str(back), str(touched), pause)
    return table


def _waits(report: Report) -> Table:
    table = Table(
        "Seconds", *(Column(name, justify="right") for name in ("n", "p50", "p90", "p99", "max"))
    )
    for name, figures in waits(report):
        table.add_row(name, *cells(figures))
    return table


def waits(report: Report) -> list[tuple[str, Quantiles]]:
    """The lengths of time that a report tells, with their names."""
    return [
        ("First token, undisturbed", report.calm_ttft),
        ("First token, under faults", report.ttft),
        ("Gap between texts, undisturbed", report.calm_gaps),
        ("Gap between texts, under faults", report.gaps),
        ("Pause of an answer that was hit", report.pauses),
        ("Victim struck until whole again", report.outages),
    ]


def cells(figures: Quantiles) -> list[str]:
    """A row: count, p50, p90, p99, maximum."""
    lengths_s = (figures.p50_s, figures.p90_s, figures.p99_s, figures.max_s)
    if not figures.count:
        return ["0", "-", "-", "-", "-"]
    return [str(figures.count), *(f"{length_s:.3f}" for length_s in lengths_s)]


def _style(passed: bool) -> str:
    return "bold green" if passed else "bold red"
