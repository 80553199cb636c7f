"""``popmesh drill site-loss``: what clients see when a whole site dies, and when it comes back."""

from __future__ import annotations

from pathlib import Path

import click

from popmesh.commands.common import DEFAULT_MESH, DIRECTORY
from popmesh.commands.durations import FAILED, Duration

MAX_AWAY_S = 3600.0
"""Longest absence, see ``wire.messages.MAX_AWAY_MS``."""


@click.command("site-loss")
@click.option("--site", required=True, metavar="NAME", help="Which site is lost.")
@click.option(
    "--mesh",
    envvar="POPMESH_MESH",
    show_envvar=True,
    default=DEFAULT_MESH,
    show_default=True,
    metavar="URL[,URL]",
    help="Routers of the mesh; clients use all of them.",
)
@click.option(
    "--api-key", envvar="POPMESH_API_KEY", show_envvar=True, metavar="KEY", help="Of a tenant."
)
@click.option(
    "--operator-key",
    envvar="POPMESH_OPERATOR_KEY",
    show_envvar=True,
    metavar="KEY",
    help="Key of an operator; needed unless the routers are on this machine.",
)
@click.option("--model", metavar="NAME", help="Which model to ask. Default: the first one served.")
@click.option(
    "--duration",
    type=Duration(),
    default="30s",
    show_default=True,
    help="How long the site stays away; it may start again then.",
)
@click.option("--streams", type=click.IntRange(1, 256), default=8, show_default=True)
@click.option(
    "--deadline",
    type=Duration(),
    default="120s",
    show_default=True,
    help="An answer that takes longer hangs.",
)
@click.option("--exact", is_flag=True, help="Answers must equal those before the loss.")
@click.option("--alone", is_flag=True, help="Even if nobody else can answer meanwhile.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--report", type=DIRECTORY, metavar="DIR", help="Write report.json and report.html.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON, and nothing else.")
def site_loss(
    site: str,
    mesh: str,
    api_key: str | None,
    operator_key: str | None,
    model: str | None,
    duration: float,
    streams: int,
    deadline: float,
    exact: bool,
    alone: bool,
    seed: int,
    report: Path | None,
    as_json: bool,
) -> None:
    """Kill every node of a site at once, keep them away, and check what clients see.

    Clients ask the mesh the whole time and compare every answer, as in the chaos drill. Told are
    the pauses, when requests went elsewhere, what was left, and how long the site took to answer
    again once it could start. Nodes take part only when they were started with --drills. Exit code
    0: passed, 1: not passed, 2: the drill could not be held.

    \b
    Examples:
      popmesh up mesh.yaml --drills &
      popmesh drill site-loss --site ams --duration 30s --report build/site-loss
    """
    import sys

    import msgspec
    from rich.console import Console

    from popmesh.drill.report import write_json
    from popmesh.drill.setup import check_permission, find_model, routers_of
    from popmesh.drill.site_loss.drill import Config, SiteLoss
    from popmesh.drill.site_loss.report import SiteLossReport
    from popmesh.render.site_loss import site_loss_view
    from popmesh.render.site_loss_page import site_loss_page
    from popmesh.signals import run_until_signal
    from wire.errors import ConfigError

    if duration > MAX_AWAY_S:
        raise ConfigError("a site stays away for an hour at most", where="--duration")
    urls = routers_of(mesh, None, DEFAULT_MESH)
    check_permission(urls, operator_key)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
    console = Console(file=sys.stderr if as_json else None, highlight=False, soft_wrap=True)

    async def work() -> SiteLossReport:
        config = Config(
            urls=urls,
            api_key=api_key,
            operator_key=operator_key,
            model=await find_model(urls[0], api_key or operator_key, model),
            site=site,
            away_s=duration,
            streams=streams,
            deadline_s=deadline,
            seed=seed,
            exact=exact,
            alone=alone,
        )
        return await SiteLoss(config, lambda line: console.print(line, markup=False)).run()

    done = run_until_signal(work)
    if done is None:
        raise ConfigError("the drill was interrupted; lost nodes come back when their time is over")
    if report is not None:
        write_json(done, report / "report.json")
        (report / "report.html").write_text(site_loss_page(done), encoding="utf-8")
    if as_json:
        click.echo(msgspec.json.encode(done).decode())
    else:
        console.print(site_loss_view(done))
        if report is not None:
            console.print(f"Report: {report / 'report.html'}", markup=False)
    raise SystemExit(0 if done.passed else FAILED)
