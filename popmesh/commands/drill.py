"""``popmesh drill``: failures on purpose."""

from __future__ import annotations

from pathlib import Path

import click

from popmesh.commands.cold_start import cold_start
from popmesh.commands.common import DEFAULT_MESH, DIRECTORY, FILE
from popmesh.commands.durations import FAILED, MAX_DURATION_S, Duration
from popmesh.commands.site_loss import site_loss

PER_KILL_S = 60.0
"""Time that ``--kills`` allows for each. Guess: a node starts again on a busy machine."""


@click.group()
def drill() -> None:
    """Rehearse failures in a mesh that runs.

    \b
    Examples:
      popmesh drill chaos --local ready.json --duration 2m
      popmesh drill cold-start --node ams-1 --budget 20s
      popmesh drill site-loss --site ams --duration 30s
    """


drill.add_command(cold_start)
drill.add_command(site_loss)


@drill.command()
@click.option(
    "--mesh",
    envvar="POPMESH_MESH",
    show_envvar=True,
    metavar="URL[,URL]",
    help=f"Routers of the mesh. Default: those of --local, else {DEFAULT_MESH}.",
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
@click.option("--streams", type=click.IntRange(1, 256), default=16, show_default=True)
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
    help="Nodes out at once; the last whole node of a role is never harmed.",
)
@click.option(
    "--deadline",
    type=Duration(),
    default="120s",
    show_default=True,
    help="An answer that takes longer hangs.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Answers must equal those without faults (float32 alone is not enough: batch_invariant).",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--report", type=DIRECTORY, metavar="DIR", help="Write report.json and report.html.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON, and nothing else.")
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
    import sys

    import msgspec
    from rich.console import Console

    from popmesh.drill.chaos import Chaos, Config
    from popmesh.drill.faults import needs_local, parse_faults
    from popmesh.drill.local import LocalMesh
    from popmesh.drill.report import Report, write_json
    from popmesh.drill.setup import check_permission, find_model, routers_of
    from popmesh.render.drill import drill_view
    from popmesh.render.drill_page import drill_page
    from popmesh.signals import run_until_signal
    from wire.errors import ConfigError

    wanted = parse_faults(faults)
    here = LocalMesh(local) if local is not None else None
    if here is None and (names := needs_local(wanted)):
        raise ConfigError(f"{', '.join(names)} needs --local", where="--faults")
    urls = routers_of(mesh, here, DEFAULT_MESH)
    check_permission(urls, operator_key)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
    console = Console(file=sys.stderr if as_json else None, highlight=False, soft_wrap=True)

    async def work() -> Report:
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
        return await Chaos(config, lambda line: console.print(line, markup=False)).run()

    done = run_until_signal(work)
    if done is None:
        raise ConfigError("the drill was interrupted")
    if report is not None:
        write_json(done, report / "report.json")
        (report / "report.html").write_text(drill_page(done), encoding="utf-8")
    if as_json:
        click.echo(msgspec.json.encode(done).decode())
    else:
        console.print(drill_view(done))
        if report is not None:
            console.print(f"Report: {report / 'report.html'}", markup=False)
    raise SystemExit(0 if done.passed else FAILED)
