"""``popmesh drill chaos``: parts of a mesh fail under load, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from popmesh.commands.common import DEFAULT_MESH, FILE, api_key_option, mesh_option
from popmesh.commands.drilling import (
    deadline_option,
    hold,
    json_option,
    model_option,
    operator_key_option,
    report_option,
    seed_option,
    streams_option,
)
from popmesh.commands.durations import MAX_DURATION_S, Duration

if TYPE_CHECKING:
    from popmesh.drill.report import Report

PER_KILL_S = 60.0
"""Time that ``--kills`` allows for each. Guess: a node starts again on a busy machine."""


@click.command()
@mesh_option(
    f"Routers of the mesh. Default: those of --local, else {DEFAULT_MESH}.", "URL[,URL]", None
)
@api_key_option
@operator_key_option
@model_option
@click.option(
    "--local",
    type=FILE,
    metavar="READY.json",
    help="Ready file of a 'popmesh up' on this machine: for faults of routers and links.",
)
@click.option(
    "--faults",
    default="kill-agent,kill-engine,freeze-engine,freeze-agent",
    show_default=True,
    metavar="NAME,...",
    help="Also, with --local: kill-router, partition, one-way, slow, loss, cut.",
)
@click.option("--duration", type=Duration(), help="How long. Default: 60s, or 60s for each kill.")
@streams_option(16)
@click.option("--kills", type=click.IntRange(1, 10_000), metavar="N", help="End after N faults.")
@click.option(
    "--every",
    type=Duration(),
    default="3s",
    show_default=True,
    help="Mean pause between a recovery and the next fault.",
)
@click.option(
    "--max-down",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Nodes and routers out at once; the last whole one of a role is never harmed.",
)
@deadline_option
@click.option(
    "--exact",
    is_flag=True,
    help="Answers must equal those without faults (float32 alone is not enough: batch_invariant).",
)
@seed_option
@report_option
@json_option
def chaos(
    mesh: str | None,
    api_key: str | None,
    operator_key: str | None,
    model: str | None,
    local: Path | None,
    faults: str,
    duration: float | None,
    streams: int,
    kills: int | None,
    every: float,
    max_down: int,
    deadline: float,
    exact: bool,
    seed: int,
    report: Path | None,
    as_json: bool,
) -> None:
    """Break parts of a running mesh under load, and check what clients see.

    Clients ask the mesh the whole time, and every answer is compared with the one that the same
    request got before the first fault: no token may be wrong, missing or repeated, no stream cut.
    Nodes take part only when they were started with --drills. Exit code 0: passed, 1: not passed,
    2: the drill could not be held.

    \b
    Examples:
      popmesh drill chaos --mesh http://10.0.0.5:8080 --operator-key KEY --duration 5m
      popmesh up mesh.yaml --drills --ready-file ready.json &
      popmesh drill chaos --local ready.json --faults kill-router,partition --report build/drill
    """
    from popmesh.drill.chaos import Chaos, Config
    from popmesh.drill.faults import needs_local, parse_faults
    from popmesh.drill.local import LocalMesh
    from popmesh.drill.setup import check_permission, find_model, routers_of
    from popmesh.render.drill import drill_view
    from popmesh.render.drill_page import drill_page
    from wire.errors import ConfigError

    wanted = parse_faults(faults)
    here = LocalMesh(local) if local is not None else None
    if here is None and (names := needs_local(wanted)):
        raise ConfigError(f"{', '.join(names)} needs --local", where="--faults")
    urls = routers_of(mesh, here, DEFAULT_MESH)
    check_permission(urls, operator_key)

    async def work(say: Callable[[str], None]) -> Report:
        config = Config(
            urls=urls,
            api_key=api_key,
            operator_key=operator_key,
            model=await find_model(urls[0], api_key or operator_key, model),
            faults=wanted,
            duration_s=duration or min((kills or 1) * PER_KILL_S, MAX_DURATION_S),
            streams=streams,
            every_s=every,
            kills=kills,
            max_down=max_down,
            deadline_s=deadline,
            seed=seed,
            exact=exact,
            local=here,
        )
        return await Chaos(config, say).run()

    hold(work, drill_view, drill_page, report, as_json, "the drill was interrupted")
