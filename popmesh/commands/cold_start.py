"""``popmesh drill cold-start``: how long a model takes to start when nothing of it is in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from popmesh.commands.common import DEFAULT_MESH, DIRECTORY, mesh_option, user_data
from popmesh.commands.drilling import (
    FAILED,
    alone_option,
    hold,
    json_option,
    model_option,
    operator_key_option,
)
from popmesh.commands.durations import Duration

if TYPE_CHECKING:
    from popmesh.drill.cold_start.report import ColdStartDrill

MAX_RUNS = 100
LONGEST = "10m"


def default_drills() -> Path:
    """``$POPMESH_DRILLS``, else under the user's data directory."""
    return user_data("POPMESH_DRILLS", "drills", "cold-start")


@click.command("cold-start")
@mesh_option()
@operator_key_option
@click.option("--node", metavar="NAME", help="Which node to start.")
@click.option("--site", metavar="NAME", help="All nodes there, one after the other.")
@model_option
@click.option(
    "--from",
    "source",
    type=click.Choice(("disk", "peer", "origin")),
    default="disk",
    show_default=True,
    help="Where its bytes come from; the node's own copy is put aside for peer and origin.",
)
@click.option(
    "--libraries", is_flag=True, help="Drop the files of Python and its libraries from memory too."
)
@click.option("--whole", is_flag=True, help="Start the whole node anew, its agent too.")
@click.option("--runs", type=click.IntRange(1, MAX_RUNS), default=1, show_default=True)
@click.option("--budget", type=Duration(), help="Longest start that passes. Default: any.")
@click.option(
    "--longest",
    type=Duration(),
    default=LONGEST,
    show_default=True,
    help="A start that takes longer has failed.",
)
@alone_option
@click.option(
    "--project",
    metavar="BYTES@RANKS,...",
    help="No drill: calculate the start of other models from what was measured.",
)
@click.option("--rate", metavar="BYTES/s", help="For --project: what a rank loads a second.")
@click.option(
    "--report",
    type=DIRECTORY,
    default=default_drills,
    show_default="$POPMESH_DRILLS or ~/.local/share/popmesh/drills/cold-start",
    metavar="DIR",
    help="report.json, report.html, and the history of earlier runs.",
)
@json_option
def cold_start(
    mesh: str,
    operator_key: str | None,
    node: str | None,
    site: str | None,
    model: str | None,
    source: str,
    libraries: bool,
    whole: bool,
    runs: int,
    budget: float | None,
    longest: float,
    alone: bool,
    project: str | None,
    rate: str | None,
    report: Path,
    as_json: bool,
) -> None:
    """Time a model's start with nothing of it in memory, on a mesh that serves.

    The node takes the model down once its requests have ended, drops its files from the page cache,
    makes sure that no page is left, and starts it in a new process; others answer meanwhile. Exit
    code 0: every start came in time, 1: not so, 2: the drill could not be held.

    \b
    Examples:
      popmesh drill cold-start --node ams-1 --runs 5 --budget 20s
      popmesh drill cold-start --site ams --libraries --json > cold.json
      popmesh drill cold-start --project 560GB@8,218GB@2
    """
    from wire.errors import ConfigError

    if project is not None:
        raise SystemExit(_project(project, rate, report, budget, as_json))
    if rate is not None:
        raise ConfigError("is for --project", where="--rate")
    if (node is None) == (site is None):
        raise ConfigError(
            "name one node or one site", suggestion="--node NAME or --site NAME; see popmesh status"
        )
    from popmesh.drill.cold_start.runner import ColdStarts, Config
    from popmesh.drill.setup import check_permission, find_model, routers_of
    from popmesh.render.cold_start import cold_start_view
    from popmesh.render.cold_start_page import cold_start_page

    (url, *others) = routers_of(mesh, None, DEFAULT_MESH)
    if others:
        raise ConfigError("one router is enough", where="--mesh")
    check_permission((url,), operator_key)

    async def work(say: Callable[[str], None]) -> ColdStartDrill:
        config = Config(
            url=url,
            key=operator_key,
            model=await find_model(url, operator_key, model),
            node=node,
            site=site,
            source=source,  # type: ignore[arg-type]  # click has checked it
            libraries=libraries,
            whole=whole,
            runs=runs,
            budget_s=budget,
            longest_s=longest,
            alone=alone,
            directory=report,
        )
        return await ColdStarts(config, say).run()

    interrupted = "the drill was interrupted; its node starts the model again by itself"
    hold(work, cold_start_view, cold_start_page, report, as_json, interrupted)


def _project(text: str, rate: str | None, report: Path, budget: float | None, as_json: bool) -> int:
    """Print the calculation; returns the exit code, which is by the budget if one is given."""
    import msgspec
    from rich.console import Console

    import popmesh
    from popmesh.drill.cold_start import projection as calculation
    from popmesh.render.cold_start import projection_view

    shapes = calculation.parse_shapes(text)
    newest = report / "report.json"
    if rate is not None:
        rates = calculation.given_rates(calculation.parse_rate(rate), newest)
    else:
        source_tree = Path(popmesh.__file__).parents[1]
        benchmark = source_tree / "benchmarks" / "results" / "warm_start.json"
        rates = calculation.measured_rates(newest, benchmark)
    done = [calculation.project(shape, rates, budget or calculation.BUDGET_S) for shape in shapes]
    if as_json:
        click.echo(msgspec.json.encode(done).decode())
    else:
        console = Console(highlight=False, soft_wrap=True)
        for one in done:
            console.print(projection_view(one))
    late = budget is not None and not all(one.passed for one in done)
    return FAILED if late else 0
