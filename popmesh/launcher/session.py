"""From options to a running mesh: models into the store, ports, plan, processes, way down."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from pop_node.store.store import Store
from popmesh.launcher.local import LocalMesh
from popmesh.launcher.plan import LaunchPlan, make_plan
from popmesh.launcher.ports import FreePorts, is_free
from popmesh.render.progress import Phases
from popmesh.signals import run_until_signal
from registry.client import Registry
from topology.cores import usable_cores
from topology.model import Topology
from wire.errors import ConfigError, PeerError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """What ``popmesh up`` was asked for. ``store`` is for nodes of ``topology`` without one;
    ``registry_url`` None: embedded."""

    topology: Topology
    store: Path
    port: int | None = None
    registry_url: str | None = None
    emulate_links: bool = True
    ready_file: Path | None = None
    log_dir: Path | None = None
    drills: bool = False


def run_mesh(
    options: Options, console: Console, inside: Callable[[LocalMesh], Awaitable[T]]
) -> T | None:
    """Run the mesh, and ``inside`` once it is ready; returns what that returned, None on a signal.

    Files that nobody asked for are removed at the end, and kept for a look when something went
    wrong. Raises ``MeshError``, possibly in an exception group.
    """
    _check_sources(options)
    if options.registry_url is not None:
        asyncio.run(_check_registry(options.registry_url))
    ports = _free_ports(options)
    _add_models(options, console)
    directory = Path(tempfile.mkdtemp(prefix=f"popmesh-{options.topology.mesh}-"))
    mesh = LocalMesh(
        _plan(options, directory, ports),
        options.log_dir or directory / "logs",
        options.ready_file,
        os.environ.get("POPMESH_API_KEY"),
        lambda text: console.print(Text(text, style="yellow")),
    )

    async def work() -> T:
        with ExitStack() as bars:
            phases = bars.enter_context(Phases(console))
            async with mesh.serving(phases.report):
                bars.close()
                return await inside(mesh)

    result = run_until_signal(work)
    shutil.rmtree(directory)
    return result


def _check_sources(options: Options) -> None:
    """Raises ``ConfigError`` when a model without a source is in no store of a node that has it:
    its nodes would look for each other's in vain."""
    topology = options.topology
    for name, model in topology.models.items():
        stores = {n.store or options.store for n in topology.nodes.values() if name in n.models}
        if model.source is None and stores and not any(name in _names(one) for one in stores):
            raise ConfigError(
                f"model {name} is in no store of its nodes: {', '.join(map(str, sorted(stores)))}",
                where=topology.source or None,
                suggestion="give it a source, or add it with 'popmesh model add --store'",
            )


def _names(store: Path) -> set[str]:
    return {manifest.name for manifest in Store(store).list()}


def _add_models(options: Options, console: Console) -> None:
    """Put the models that nodes serve into the store that they share; raises ``ConfigError`` if one
    is nowhere.

    What the store holds under the name already is taken as it is: a digest in the topology, which
    the nodes check, says whether that is the right one.
    """
    store = Store(options.store)
    held = {manifest.name: manifest.dtype for manifest in store.list()}
    sharing = [node for node in options.topology.nodes.values() if node.store is None]
    wanted = {name for node in sharing for name in node.models}
    for name, model in options.topology.models.items():
        if name not in wanted or held.get(name) == model.dtype:
            continue
        if model.source is None:
            raise ConfigError(
                f"model {name} ({model.dtype}) is not in the store {options.store}",
                where=options.topology.source or None,
                suggestion="give it a source, or add it with 'popmesh model add'",
            )
        try:
            with Phases(console) as phases:
                store.add(model.source, name, model.dtype, phases.report)
        except ConfigError as exc:
            raise ConfigError(
                f"model {name} cannot be added from its source: {exc.message}",
                where=options.topology.source or None,
            ) from exc


async def _check_registry(url: str) -> None:
    """Raises ``ConfigError`` if nothing answers: the mesh would wait for it in silence."""
    try:
        async with Registry.connect(url) as registry:
            await registry.leader()
    except PeerError as exc:
        raise ConfigError(
            f"no registry answers at {url.partition('?')[0]}",
            suggestion="start Consul there, or leave --registry out for an embedded one",
        ) from exc


def _free_ports(options: Options) -> FreePorts:
    """A source of ports that nobody wants by number; raises ``ConfigError``."""
    ports = FreePorts(random.SystemRandom())
    for node in options.topology.nodes.values():
        for position in range(max(1, len(node.models))):
            ports.reserve(node.kv.port + position)
        ports.reserve(node.mesh.port)
        ports.reserve(node.bundles.port)
    for router in options.topology.routers.values():
        ports.reserve(router.listen.port)
    if options.port is not None:
        ports.reserve(options.port)
        if not is_free(options.port):
            raise ConfigError(
                f"port {options.port} of 127.0.0.1 is taken", suggestion="choose another --port"
            )
    return ports


def _plan(options: Options, directory: Path, ports: FreePorts) -> LaunchPlan:
    return make_plan(
        options.topology,
        directory,
        options.store,
        ports.take,
        cores=usable_cores(),
        router_port=options.port,
        registry_url=options.registry_url,
        emulate_links=options.emulate_links,
        drills=options.drills,
    )
