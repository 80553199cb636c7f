"""The ``popmesh`` command: its groups and how errors end it.

Commands import what they need when they run, so that ``popmesh --help`` stays quick and a machine
that only runs a router never loads torch.
"""

from __future__ import annotations

import os
import sys

import click

from popmesh.commands.chat import chat
from popmesh.commands.demo import demo
from popmesh.commands.drill import drill
from popmesh.commands.explain import explain
from popmesh.commands.links import links
from popmesh.commands.model import model
from popmesh.commands.node import node
from popmesh.commands.registry import registry
from popmesh.commands.router import router
from popmesh.commands.status import status
from popmesh.commands.tls import tls
from popmesh.commands.topology import topology
from popmesh.commands.up import up
from wire.errors import MeshError

EXIT_CODE = 2
"""Of every refusal; a launcher does not restart a process that ended with it."""


class _Failure(click.ClickException):
    exit_code = EXIT_CODE


class _MeshGroup(click.Group):
    """Turns the errors that popmesh raises on purpose into one message on stderr."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (MeshError, OSError) as exc:
            raise _Failure(_text(exc)) from exc
        except BaseExceptionGroup as group:
            expected, bugs = group.split((MeshError, OSError))
            if expected is None or bugs is not None:
                raise
            raise _Failure(_text(_first(expected))) from group


@click.group(cls=_MeshGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="popmesh")
def main() -> None:
    """Serve open-weight language models from many sites.

    A request enters the nearest router. One site reads the prompt (prefill), another writes the
    answer (decode), and the KV cache streams between them.

    \b
    Try it:              popmesh demo
    Your own mesh, here: popmesh up TOPOLOGY.yaml
    On real machines:    popmesh node / popmesh router, one per machine, with Consul
    Look inside:         popmesh status, popmesh explain "a prompt", popmesh chat
    Rehearse failures:   popmesh drill chaos
    """
    _open_standard_files()
    if "POPMESH_LAUNCHER_PID" in os.environ:
        from popmesh.launcher.orphan import die_with_launcher

        die_with_launcher()


def _open_standard_files() -> None:
    """Put the null device where stdin, stdout or stderr came closed (``popmesh ... <&-``).

    Else the first socket takes the free descriptor, for which libuv aborts the process.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            file = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, file)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _text(error: BaseException) -> str:
    return error.message if isinstance(error, MeshError) and error.message else str(error)


for _command in (
    up,
    demo,
    status,
    chat,
    explain,
    topology,
    model,
    node,
    router,
    registry,
    links,
    tls,
    drill,
):
    main.add_command(_command)
