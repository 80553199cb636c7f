"""``popmesh chat``: talk to a mesh."""

from __future__ import annotations

import click

from popmesh.commands.common import mesh_options, parse_position


@click.command()
@mesh_options
@click.option("--model", metavar="NAME", help="Model. Default: the first one served.")
@click.option("--from", "origin", metavar="LAT,LON", help="Ask as a client at this position.")
def chat(mesh: str, api_key: str | None, model: str | None, origin: str | None) -> None:
    """Chat in the terminal.

    Each answer is followed by the route that it took.

    End with Ctrl-D or /quit. Lines piped in are answered one after the other.

    \b
    Examples:
      popmesh chat
      echo "What is a PoP?" | popmesh chat --mesh http://127.0.0.1:8080 --from 51.5,-0.1
    """
    import sys

    from rich.console import Console

    from popmesh.client import MeshClient
    from popmesh.conversation import converse, terminal_lines
    from popmesh.signals import run_until_signal

    if origin is not None:
        parse_position(origin)
    console = Console()

    async def work() -> bool:
        async with MeshClient(mesh, api_key) as client:
            chosen = await client.pick_model(model)
            return await converse(client, console, chosen, terminal_lines(console), origin)

    complete = run_until_signal(work)
    if complete is False and not sys.stdin.isatty():
        raise SystemExit(1)  # whoever piped the lines in did not see the message
