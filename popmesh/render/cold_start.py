"""A cold-start drill and a projection in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from pop_node.drills.pages import Dropped
from pop_node.drills.report import Phase
from popmesh.drill.cold_start.projection import Projection
from popmesh.drill.cold_start.report import ColdStartDrill, Run
from popmesh.render.models import size
from popmesh.render.words import counted, name_column

MIN_SHARE = 0.01
"""Of a bar, for what took next to no time: about an eighth of a character."""


def cold_start_view(report: ColdStartDrill) -> Group:
    """Result, runs, the middle run phase by phase for each node, what is wrong or slower."""
    style = "bold green" if report.passed else "bold red"
    parts: list[RenderableType] = [
        Text("Passed." if report.passed else "Not passed.", style=style),
        Text(" ".join(facts(report))),
    ]
    if report.runs:
        parts.append(_runs(report.runs))
    for node in report.nodes:
        run = middle_run(report.runs, node)
        if run is not None:
            parts += [Text(f"{node}, run {run.number}: {coldness(run)}"), _phases(run)]
    parts += [Text(f"- {problem}", style="red") for problem in report.problems]
    parts += [Text(f"slower: {row.words()}", style="yellow") for row in report.regressions]
    return Group(*parts)


def facts(report: ColdStartDrill) -> list[str]:
    """Sentences about the whole drill."""
    budget = "" if report.budget_s is None else f", budget {report.budget_s:g} s for each"
    sizes = sorted({run.bundle_bytes for run in report.runs})
    said = [
        f"{report.model} ({', '.join(map(size, sizes)) or 'not started'}) from {report.source}, "
        f"mesh {report.mesh}; {counted(len(report.runs), 'cold start')}{budget}."
    ]
    if report.runs:
        times = report.times
        said.append(
            f"Process start until routers send requests there: p50 {times.p50_s:.2f} s, "
            f"longest {times.max_s:.2f} s."
        )
    return said


def coldness(run: Run) -> str:
    """What was cold in a run, by the kernel's count of pages."""
    cold = run.cold
    if cold.model is None:
        texts = ["the model was not on the disk"]
    else:
        texts = [f"{cold.model_pages_resident} of the model's {cold.model_pages} pages in memory"]
    if cold.libraries is None:
        return f"{texts[0]}; Python and its libraries left as they were"
    texts.append(
        f"{cold.library_pages_resident} of {cold.library_pages} pages of Python and its libraries"
    )
    if held := _held(cold.libraries):
        texts.append(held)
    return "; ".join(texts)


def _held(dropped: Dropped) -> str:
    if not dropped.resident or not dropped.holders:
        return ""
    shown = ", ".join(f"{holder.name} {holder.pid}" for holder in dropped.holders[:4])
    more = len(dropped.holders) - 4
    return f"held by {shown}{f' and {more} more' if more > 0 else ''}"


def middle_run(runs: Sequence[Run], node: str) -> Run | None:
    """The run of a node whose time is the median, the faster of two; None if it has none."""
    ordered = sorted((run for run in runs if run.node == node), key=lambda run: run.time_s)
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def rate_of(phase: Phase) -> str:
    """Bytes per second through a phase; empty where none went through."""
    length_s = phase.end_s - phase.start_s
    return f"{size(round(phase.nbytes / length_s))}/s" if phase.nbytes and length_s > 0 else ""


def _runs(runs: Sequence[Run]) -> Table:
    numbers = ("Ready, s", "In plan, s", "Down, s", "Rate", "Load avg")
    columns = [Column(name, justify="right") for name in numbers]
    table = Table("Run", name_column("Node"), *columns, "")
    longest_s = max(run.time_s for run in runs)
    for run in runs:
        rate = run.bytes_per_s()
        seen = "-" if run.seen_ready_s is None else f"{run.seen_ready_s:.2f}"
        table.add_row(
            str(run.number),
            run.node,
            f"{run.ready_s:.2f}",
            seen,
            f"{run.down_s:.2f}",
            "-" if rate is None else f"{size(round(rate))}/s",
            f"{run.load_average:.1f}",
            bar(0.0, run.time_s, longest_s),
        )
    return table


def _phases(run: Run) -> Table:
    names = ("From, s", "Length, s", "Bytes", "Rate")
    table = Table("Phase", *(Column(name, justify="right") for name in names), "")
    for phase in run.phases:
        table.add_row(
            phase.name,
            f"{phase.start_s:.3f}",
            f"{phase.end_s - phase.start_s:.3f}",
            size(phase.nbytes) if phase.nbytes else "",
            rate_of(phase),
            bar(phase.start_s, phase.end_s, run.time_s),
        )
    return table


def bar(start_s: float, end_s: float, whole_s: float) -> Bar:
    """A bar within the whole, as wide as there is room; a short phase is seen too."""
    shown_s = max(whole_s, start_s, 1e-9)
    start_s = min(start_s, shown_s * (1 - MIN_SHARE))
    return Bar(shown_s, start_s, max(end_s, start_s + shown_s * MIN_SHARE))


# ---- projections --------------------------------------------------------------------------------


def projection_view(projection: Projection) -> Group:
    """The calculation with its assumptions."""
    ranks = "1 rank" if projection.ranks == 1 else f"{projection.ranks} ranks"
    numbers = ("Rate of a rank", "Load, s", "Start, s")
    table = Table("Drives", *(Column(name, justify="right") for name in numbers), "")
    for row in projection.rows:
        verdict = "within" if row.within else "over"
        table.add_row(
            row.drives,
            f"{size(round(row.rank_bytes_per_s))}/s",
            f"{row.load_s:.1f}",
            f"{row.total_s:.1f}",
            Text(f"{verdict} {projection.budget_s:g} s", style="green" if row.within else "red"),
        )
    needed = projection.needed_bytes_per_s
    head = f"{size(projection.nbytes)} on {ranks}: a calculation, not a measurement."
    return Group(
        Text(head, style="bold"),
        table,
        Text(
            f"For {projection.budget_s:g} s each rank needs {size(round(needed))}/s, "
            f"all together {size(round(needed * projection.ranks))}/s."
            if needed is not None
            else f"No drive is fast enough for {projection.budget_s:g} s: the rest takes longer."
        ),
        Text("Assumed:"),
        *(Text(f"- {text}") for text in projection.assumptions),
    )
