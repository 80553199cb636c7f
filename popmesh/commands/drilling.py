"""What drills share on the command line: their options, and how they are held and end."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from popmesh.commands.common import DIRECTORY
from popmesh.commands.durations import Duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from popmesh.drill.cold_start.report import ColdStartDrill
    from popmesh.drill.report import Report
    from popmesh.drill.site_loss.report import SiteLossReport

R = TypeVar("R", "Report", "SiteLossReport", "ColdStartDrill")

FAILED = 1
"""Exit code of a drill that was held and not passed; 2 is that of one that could not be held."""

operator_key_option = click.option(
    "--operator-key",
    envvar="POPMESH_OPERATOR_KEY",
    show_envvar=True,
    metavar="KEY",
    help="Key of an operator; needed unless the routers are on this machine.",
)
model_option = click.option(
    "--model", metavar="NAME", help="Which model to ask. Default: the first one served."
)
deadline_option = click.option(
    "--deadline",
    type=Duration(),
    default="120s",
    show_default=True,
    help="An answer that takes longer hangs.",
)
alone_option = click.option(
    "--alone", is_flag=True, help="Even if nobody else can answer meanwhile."
)
seed_option = click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
report_option = click.option(
    "--report", type=DIRECTORY, metavar="DIR", help="Write report.json and report.html."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="The result as JSON, and nothing else."
)


def streams_option(default: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--streams``: how many clients ask at a time."""
    return click.option(
        "--streams", type=click.IntRange(1, 256), default=default, show_default=True
    )


def hold(
    drill: Callable[[Callable[[str], None]], Coroutine[Any, Any, R]],
    view: Callable[[R], RenderableType],
    page: Callable[[R], str],
    report: Path | None,
    as_json: bool,
    interrupted: str,
) -> NoReturn:
    """Hold a drill, keep and show its result, and exit by whether it was passed.

    ``drill`` gets what tells a person how it goes; ``view`` and ``page`` draw the result for a
    terminal and a browser; ``report`` is the directory that keeps it. Raises ``ConfigError`` with
    ``interrupted`` when a signal ended the drill, ``MeshError`` when it cannot be held.
    """
    import sys

    import msgspec
    from rich.console import Console

    from popmesh.drill.report import write_json
    from popmesh.signals import run_until_signal
    from wire.errors import ConfigError

    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
    console = Console(file=sys.stderr if as_json else None, highlight=False, soft_wrap=True)
    done = run_until_signal(lambda: drill(lambda line: console.print(line, markup=False)))
    if done is None:
        raise ConfigError(interrupted)
    if report is not None:
        write_json(done, report / "report.json")
        (report / "report.html").write_text(page(done), encoding="utf-8")
    if as_json:
        click.echo(msgspec.json.encode(done).decode())
    else:
        console.print(view(done))
        if report is not None:
            console.print(f"Report: {report / 'report.html'}", markup=False)
    raise SystemExit(0 if done.passed else FAILED)
