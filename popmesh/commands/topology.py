"""``popmesh topology``: look at a topology file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import click

from popmesh.commands.common import FILE, parse_size, store_option

if TYPE_CHECKING:
    from topology.budget import ModelSize

DOES_NOT_FIT = 1
"""Exit code of a plan with problems; 2 is that of a file or option that cannot be read."""


@click.group()
def topology() -> None:
    """Work with topology files: the whole mesh as YAML.

    \b
    Example: popmesh topology check mesh.yaml
    """


@topology.command()
@click.argument("file", type=FILE)
def check(file: Path) -> None:
    """Check FILE without starting anything, and show what it says.

    Every mistake is named with its line. What the file leaves open about links is estimated from
    the distance and shown with a ~.

    \b
    Example: popmesh topology check topology/examples/demo.yaml
    """
    from rich.console import Console

    from popmesh.render.topology import site_table
    from popmesh.render.words import counted
    from topology.load import load_topology

    mesh = load_topology(file)
    console = Console()
    console.print(site_table(mesh))
    console.print(
        f"{file}: mesh {mesh.mesh!r} is fine: {counted(len(mesh.sites), 'site')}, "
        f"{counted(len(mesh.nodes), 'node')}, {counted(len(mesh.routers), 'router')}, "
        f"{counted(len(mesh.models), 'model')}",
        highlight=False,
        soft_wrap=True,
    )


@topology.command()
@click.argument("file", type=FILE)
@store_option
@click.option(
    "--size",
    "given",
    multiple=True,
    metavar="NAME=SIZE[:KV]",
    help="Size of the model NAME, and of one token of its KV cache. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON for scripts.")
def plan(file: Path, store: Path, given: tuple[str, ...], as_json: bool) -> None:
    """Say what FILE asks of each node: disk, memory, room for KV, and what does not fit.

    Nothing is started and nothing fetched. Sizes come from the models in the store, from bundles at
    the URLs that FILE names, or from --size for models that are nowhere yet. Times to fetch are
    those of a mesh whose disks are empty, over the links as FILE has them. The exit code is 1 when
    something does not fit.

    \b
    Examples:
      popmesh topology plan mesh.yaml
      popmesh topology plan mesh.yaml --size llama-3.1-8b=16.1GB:131072
    """
    import json

    from rich.console import Console

    from popmesh.model_sizes import find_sizes
    from popmesh.render.topology_plan import plan_json, plan_view
    from topology.load import load_topology
    from topology.planner import plan_mesh
    from topology.reading.key_lines import KeyLines

    mesh = load_topology(file)
    lines = KeyLines(file.read_text("utf-8-sig"), str(file))
    sizes = find_sizes(
        mesh.models.values(), store, dict(_given_size(text, mesh.models) for text in given)
    )
    planned = plan_mesh(mesh, sizes.known, sizes.unknown)
    if as_json:
        click.echo(json.dumps(plan_json(planned, lines), indent=1))
    else:
        Console().print(plan_view(planned, lines))
    raise SystemExit(DOES_NOT_FIT if planned.problems else 0)


def _given_size(text: str, models: Collection[str]) -> tuple[str, ModelSize]:
    """``NAME=SIZE[:KV]`` for one of ``models``; raises ``ConfigError``."""
    from topology.budget import ModelSize
    from topology.reading.problems import closest
    from wire.errors import ConfigError

    name, found, size = text.partition("=")
    if not name or not found:
        raise ConfigError(
            f"{text!r} is no model's size", suggestion="write e.g. --size llama-8b=16.1GB:131072"
        )
    if name not in models:
        raise ConfigError(f"there is no model {name!r}", suggestion=closest(name, models))
    weights, _, kv = size.partition(":")
    nbytes = parse_size(weights)
    return name, ModelSize(nbytes, nbytes, parse_size(kv) if kv else 0)
