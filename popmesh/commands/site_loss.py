"""``popmesh drill site-loss``: what clients see when a whole site dies, and when it comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from popmesh.commands.common import DEFAULT_MESH, api_key_option, mesh_option
from popmesh.commands.drilling import (
    alone_option,
    deadline_option,
    hold,
    json_option,
    model_option,
    operator_key_option,
    report_option,
    seed_option,
    streams_option,
)
from popmesh.commands.durations import Duration

if TYPE_CHECKING:
    from popmesh.drill.site_loss.report import SiteLossReport


@click.command("site-loss")
@click.option("--site", required=True, metavar="NAME", help="Which site is lost.")
@mesh_option("Routers of the mesh; clients use all of them.", "URL[,URL]")
@api_key_option
@operator_key_option
@model_option
@click.option(
    "--duration",
    type=Duration(),
    default="30s",
    show_default=True,
    help="How long the site stays away; it may start again then.",
)
@streams_option(8)
@deadline_option
@click.option("--exact", is_flag=True, help="Answers must equal those before the loss.")
@alone_option
@seed_option
@report_option
@json_option
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
    from popmesh.drill.setup import check_permission, find_model, routers_of
    from popmesh.drill.site_loss.drill import Config, SiteLoss
    from popmesh.render.site_loss import site_loss_view
    from popmesh.render.site_loss_page import site_loss_page
    from wire.errors import ConfigError
    from wire.messages import MAX_AWAY_MS

    if duration > MAX_AWAY_MS / 1000:
        longest = f"{MAX_AWAY_MS / 3.6e6:g} h"
        raise ConfigError(f"a site stays away for {longest} at most", where="--duration")
    urls = routers_of(mesh, None, DEFAULT_MESH)
    check_permission(urls, operator_key)

    async def work(say: Callable[[str], None]) -> SiteLossReport:
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
        return await SiteLoss(config, say).run()

    interrupted = "the drill was interrupted; lost nodes come back when their time is over"
    hold(work, site_loss_view, site_loss_page, report, as_json, interrupted)
