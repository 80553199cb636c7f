"""``popmesh links``: the shaper process, and live changes to its links."""

from __future__ import annotations

from pathlib import Path

import click

from popmesh.commands.common import FILE, log_to_stderr

PLAN_HELP = "Links and ports, as JSON ('shaper.plan' in the ready file of 'popmesh up')."

plan_option = click.option("--plan", required=True, type=FILE, metavar="FILE", help=PLAN_HELP)


@click.group(invoke_without_command=True)
@click.option("--plan", type=FILE, metavar="FILE", help=PLAN_HELP)
@click.pass_context
def links(context: click.Context, plan: Path | None) -> None:
    """Emulate wide-area links on this machine.

    'popmesh up' starts this by itself. Every port of the plan forwards to its target with the
    delay and the rate of the link between two sites. The commands below break, slow down and heal
    links while they carry traffic; a plan edited by hand is read again on SIGHUP.

    \b
    Example plan:
      {"links": [{"a": "ams", "b": "nyc", "rtt_ms": 80, "bandwidth_mbps": 1000}],
       "ports": [{"listen": "127.0.0.1:9001", "target": "127.0.0.1:7001",
                  "from_site": "ams", "to_site": "nyc"}]}
    \b
    Example: popmesh links --plan links.json
    """
    if context.invoked_subcommand is not None:
        return
    if plan is None:
        raise click.UsageError("--plan FILE says which links")
    _serve(plan)


@links.command("set")
@click.argument("a", metavar="SITE")
@click.argument("b", metavar="SITE")
@click.option("--one-way", is_flag=True, help="Only what the first site sends to the second.")
@click.option("--down", is_flag=True, help="Nothing gets through, and nobody is told.")
@click.option(
    "--rate-percent",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="N",
    help="Share of the link's own bandwidth that is left.",
)
@click.option("--rtt-ms", type=click.FloatRange(0), metavar="N", help="Round trip, half each way.")
@click.option(
    "--jitter-ms", type=click.FloatRange(0), default=0.0, metavar="N", help="Added at random."
)
@click.option(
    "--loss-percent",
    type=click.FloatRange(0, 50),
    default=0.0,
    metavar="N",
    help="Packets lost; TCP repeats them, so each is a stall.",
)
@plan_option
def set_link(
    plan: Path,
    a: str,
    b: str,
    one_way: bool,
    down: bool,
    rate_percent: float | None,
    rtt_ms: float | None,
    jitter_ms: float,
    loss_percent: float,
) -> None:
    """Disturb the link between two sites, in place of what was wrong with it before.

    \b
    Examples:
      popmesh links set ams nyc --down --one-way --plan links.json
      popmesh links set ams nyc --rate-percent 1 --loss-percent 5 --plan links.json
    """
    from popmesh.links.control import both_ways, disturb
    from popmesh.links.plan import read_link_plan

    mbps = None
    link = read_link_plan(plan).by_pair().get(frozenset((a, b)))
    if rate_percent is not None and link is not None:  # disturb says which links there are
        mbps = link.bandwidth_mbps * rate_percent / 100
    there, back = both_ways(
        a,
        b,
        down=down,
        bandwidth_mbps=mbps,
        rtt_ms=rtt_ms,
        jitter_ms=jitter_ms,
        loss=loss_percent / 100,
    )
    disturb(plan, there, *(() if one_way else (back,)))


@links.command()
@click.argument("a", metavar="SITE")
@click.argument("b", metavar="SITE")
@plan_option
def cut(plan: Path, a: str, b: str) -> None:
    """Reset every open connection between two sites, once.

    \b
    Example: popmesh links cut ams nyc --plan links.json
    """
    from popmesh.links.control import cut as cut_link

    cut_link(plan, a, b)


@links.command()
@click.argument("sites", nargs=-1, metavar="[SITE SITE]")
@plan_option
def heal(plan: Path, sites: tuple[str, ...]) -> None:
    """Put the link between two sites right again, or all links.

    \b
    Example: popmesh links heal ams nyc --plan links.json
    """
    from popmesh.links.control import heal as heal_link

    if len(sites) not in (0, 2):
        raise click.UsageError("name two sites, or none for all links")
    heal_link(plan, *sites)


@links.command()
@plan_option
def show(plan: Path) -> None:
    """Every direction of every link as it is now.

    \b
    Example: popmesh links show --plan links.json
    """
    from popmesh.links.plan import read_link_plan

    content = read_link_plan(plan)
    for from_site, to_site in content.directions():
        now = content.figures(from_site, to_site)
        state = "down" if now.down else f"{now.rate_bytes_per_s * 8 / 1e6:g} Mbit/s"
        click.echo(
            f"{from_site} to {to_site}: {state}, {now.one_way_s * 1e3:g} ms one way, "
            f"jitter {now.jitter_s * 1e3:g} ms, loss {now.loss * 100:g} %"
        )


def _serve(plan: Path) -> None:
    import asyncio
    import contextlib
    import logging
    import random
    import signal

    from popmesh.links.doorbell import doorbell
    from popmesh.links.plan import read_link_plan
    from popmesh.links.shaper import Shaper
    from popmesh.signals import run_until_signal
    from wire.errors import ConfigError

    log_to_stderr()
    log = logging.getLogger("popmesh.links")
    shaper = Shaper(read_link_plan(plan), random.Random())

    def reread() -> None:
        try:
            shaper.reconfigure(read_link_plan(plan))
        except ConfigError as exc:
            log.error("the plan is unchanged: %s", exc)
            raise
        log.info("links changed as %s says", plan)

    def on_signal() -> None:
        with contextlib.suppress(ConfigError):  # logged, and there is nobody to tell
            reread()

    async def work() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_signal)
        async with doorbell(plan, reread):
            await shaper.serve(asyncio.Event())

    run_until_signal(work)
