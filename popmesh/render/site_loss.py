"""A site-loss drill in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from popmesh.drill.site_loss.report import SiteLossReport, Stretch
from popmesh.render.drill import MAX_PROBLEMS_SHOWN, cells
from popmesh.render.words import counted

HEAD = (
    *("Answers", "Right", "Wrong or cut", "Refused", "Texts/s", "TTFT p50, s", "TTFT p99, s"),
    *("Gap p99, s", "Nodes", "KV tokens"),
)


def site_loss_view(report: SiteLossReport) -> Group:
    """Result, what happened when, the stretches, pauses, and what is wrong."""
    style = "bold green" if report.passed else "bold red"
    names = (one.name for one in report.stretches)
    table = Table("", *(Column(name, justify="right") for name in names))
    for row in zip(HEAD, *map(figures, report.stretches), strict=True):
        table.add_row(*row)
    pauses = Table(
        "Seconds", *(Column(name, justify="right") for name in ("n", "p50", "p90", "p99", "max"))
    )
    pauses.add_row("Pause of an answer that was hit", *cells(report.pauses))
    parts: list[RenderableType] = [
        Text("Passed." if report.passed else "Not passed.", style=style),
        *(Text(text) for text in sentences(report)),
        table,
        pauses,
    ]
    shown = report.problems[:MAX_PROBLEMS_SHOWN]
    parts += [Text(f"- {problem}", style="red") for problem in shown]
    if len(report.problems) > len(shown):
        parts.append(Text(f"- and {len(report.problems) - len(shown)} more"))
    return Group(*parts)


def sentences(report: SiteLossReport) -> list[str]:
    """What happened, in the order of time."""
    verdicts = ", ".join(f"{count} {kind}" for kind, count in sorted(report.verdicts.items()))
    recovered = ", ".join(f"{count} by {kind}" for kind, count in report.recoveries.items())
    last = f", the last {report.spill_s:.2f} s after the blow" if report.spilled else ""
    return [
        f"Site {report.site} ({', '.join(report.nodes)}) was lost for {report.away_s:g} s. "
        f"Answers: {verdicts or 'none'}; recoveries: {recovered or 'none counted'}.",
        f"No router had a link to it after {_s(report.noticed_s)}; until then "
        f"{counted(report.spilled, 'request')} went there first{last}.",
        f"From when it could start again: first answer from there after {_s(report.answered_s)}, "
        f"all of it ready after {_s(report.whole_s)}.",
    ]


def figures(one: Stretch) -> list[str]:
    """One text for each of ``HEAD``."""
    right, refused = one.verdicts.get("right", 0), one.verdicts.get("refused", 0)
    differs = one.verdicts.get("differs", 0)
    return [
        str(one.answers),
        f"{right} + {differs} differ" if differs else str(right),
        str(one.answers - right - refused - differs),
        str(refused),
        f"{one.texts_per_s:.1f}",
        f"{one.ttft.p50_s:.3f}",
        f"{one.ttft.p99_s:.3f}",
        f"{one.gaps.p99_s:.3f}",
        str(one.nodes_ready),
        str(one.kv_tokens),
    ]


def _s(length_s: float | None) -> str:
    return "never" if length_s is None else f"{length_s:.2f} s"
