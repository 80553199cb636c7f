"""``popmesh demo``: four nodes in three sites, and an answer that crosses them."""

from __future__ import annotations

from pathlib import Path

import click

from popmesh.commands.common import store_option


@click.command()
@click.option(
    "--once", is_flag=True, help="End after the sample answer (exit code 0 if it is fine)."
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    metavar="N",
    help="Port of the router. Default: 8080, or any free one where that is taken.",
)
@store_option
def demo(once: bool, port: int | None, store: Path) -> None:
    """Show a mesh of three sites at work, here.

    Prepares a small model, starts the mesh with emulated links, and streams an answer whose prompt
    is read at one site and whose text is written at another. Then chat with it.

    \b
    Examples:
      popmesh demo
      popmesh demo --once
    """
    from popmesh.showcase import run_demo

    raise SystemExit(run_demo(store, port, once))
