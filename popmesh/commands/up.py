"""``popmesh up``: a whole topology on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from popmesh.commands.common import DIRECTORY, FILE, default_store


@click.command()
@click.argument("topology", type=FILE, metavar="TOPOLOGY.yaml")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Port of the router.")
@click.option(
    "--registry",
    default="embedded",
    show_default=True,
    metavar="embedded|consul://HOST:PORT",
    help="Start a registry, or use a Consul that runs.",
)
@click.option("--no-emulate-links", is_flag=True, help="Loopback speed instead of the links' own.")
@click.option(
    "--ready-file",
    type=FILE,
    metavar="PATH",
    help="Written as JSON once every node has produced a token, and again after a restart.",
)
@click.option(
    "--store",
    type=DIRECTORY,
    metavar="DIR",
    help="Model store of all nodes, but those with disk_gb and a store of their own. Default: each "
    "node's in TOPOLOGY.yaml, else $POPMESH_STORE.",
)
@click.option("--log-dir", type=DIRECTORY, metavar="DIR", help="Keep the processes' logs here.")
@click.option("--drills", is_flag=True, help="Let 'popmesh drill' harm the nodes on purpose.")
def up(
    topology: Path,
    port: int | None,
    registry: str,
    no_emulate_links: bool,
    ready_file: Path | None,
    store: Path | None,
    log_dir: Path | None,
    drills: bool,
) -> None:
    """Run a whole topology on this machine.

    Every process of TOPOLOGY.yaml is started here, with the links between sites emulated.

    Models that have a source are added to the shared store first; a node with a store of its own
    fetches them. A process that dies is started again.
    Ctrl-C ends everything and leaves no process behind.

    \b
    Examples:
      popmesh up topology/examples/demo.yaml --port 8080
      popmesh up mesh.yaml --ready-file ready.json --log-dir logs
    """
    import asyncio

    from rich.console import Console
    from rich.text import Text

    from popmesh.launcher.local import LocalMesh
    from popmesh.launcher.plan import with_stores
    from popmesh.launcher.session import Options, run_mesh
    from topology.load import load_topology

    options = Options(
        topology=with_stores(load_topology(topology), named=store is not None),
        store=store or default_store(),
        port=port,
        registry_url=None if registry == "embedded" else registry,
        emulate_links=not no_emulate_links,
        ready_file=ready_file,
        log_dir=log_dir,
        drills=drills,
    )
    console = Console()

    async def until_signal(mesh: LocalMesh) -> None:
        console.print(Text(f"The mesh is ready at {mesh.plan.router_url}/v1 (Ctrl-C ends it)."))
        console.print(Text(f"Logs: {mesh.log_dir}", style="dim"))
        await asyncio.get_running_loop().create_future()

    run_mesh(options, console, until_signal)
    console.print("Stopped.")
