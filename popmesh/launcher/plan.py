"""From a topology to the processes of a mesh on this machine. Pure: ports come from the caller.

Every node and router listens on loopback, whatever the file says; sites are told apart by the links
between them. A node's models take consecutive KV ports, in the order of its ``models``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from popmesh.links.plan import EmulatedLink, LinkPlan, ShapedPort
from topology.cores import engine_threads
from topology.geography import link_between
from topology.model import Address, Node, Topology
from wire.errors import ConfigError

LOOPBACK = "127.0.0.1"

TakePorts = Callable[[int], int]
"""``take(count)`` returns the first of ``count`` consecutive free ports."""

Kind = Literal["registry", "links", "node", "router"]


@dataclass(frozen=True, slots=True)
class Child:
    """A process to run: ``popmesh *arguments``. ``listens`` is where it accepts connections."""

    kind: Kind
    name: str
    arguments: tuple[str, ...]
    listens: Address


@dataclass(frozen=True, slots=True)
class Probe:
    """A pinned request that proves that ``node`` produces tokens of ``model``."""

    node: str
    model: str
    prefill: str
    decode: str


@dataclass(frozen=True, slots=True)
class Files:
    """Where the launcher keeps what its children read and write, all in one directory."""

    directory: Path

    @property
    def topology(self) -> Path:
        """The resolved topology."""
        return self.directory / "topology.yaml"

    @property
    def links(self) -> Path:
        """The shaper's plan."""
        return self.directory / "links.json"

    @property
    def cache_key(self) -> Path:
        """The key of all routers."""
        return self.directory / "cache-key"

    def link_map(self, site: str) -> Path:
        """What processes at ``site`` dial."""
        return self.directory / f"dial-{site}.json"

    def status(self, node: str) -> Path:
        """What the node's agent says about itself."""
        return self.directory / f"status-{node}.json"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """A mesh on this machine. ``topology`` has its addresses resolved; ``links`` may be off.

    ``children`` are in the order to start them; ``router_url`` is the first router's.
    """

    topology: Topology
    files: Files
    children: tuple[Child, ...]
    links: LinkPlan | None
    probes: tuple[Probe, ...]
    registry_url: str
    router_url: str


def make_plan(
    topology: Topology,
    directory: Path,
    store: Path,
    take: TakePorts,
    *,
    cores: int,
    router_port: int | None = None,
    registry_url: str | None = None,
    emulate_links: bool = True,
    drills: bool = False,
) -> LaunchPlan:
    """Resolve ``topology`` to loopback processes, which share the ``cores`` of this machine;
    ``store`` is for nodes without one of their own, ``registry_url`` None embeds a registry and
    ``drills`` lets operators harm the nodes.

    Raises ``ConfigError`` when there is no router, or a node's model can never be answered because
    nobody takes the other half of the work.
    """
    if not topology.routers:
        raise ConfigError("no router", where=topology.source or None, suggestion="add one")
    files = Files(directory)
    resolved = _with_threads(_on_loopback(topology, take, router_port), cores)
    children: list[Child] = []
    if registry_url is None:
        listens = Address(LOOPBACK, take(1))
        registry_url = f"consul://{listens}"
        arguments = ("registry", "--listen", str(listens))
        children.append(Child("registry", "registry", arguments, listens))
    links = link_plan(resolved, take) if emulate_links else None
    if links is not None and links.ports:
        host, _, port = links.ports[-1].listen.rpartition(":")
        arguments = ("links", "--plan", str(files.links))
        children.append(Child("links", "links", arguments, Address(host, int(port))))
    else:
        links = None
    children += _node_children(resolved, files, store, registry_url, links, drills)
    children += _router_children(resolved, files, registry_url, links)
    first_router = next(iter(resolved.routers.values()))
    return LaunchPlan(
        resolved,
        files,
        tuple(children),
        links,
        tuple(probes(resolved)),
        registry_url,
        f"http://{first_router.listen}",
    )


def link_plan(topology: Topology, take: TakePorts) -> LinkPlan:
    """Ports for everything that crosses sites: router to node, prefill to decode node, and nodes
    that fetch models from each other.

    Traffic inside a site is not shaped: loopback is what a rack's network looks like from here.
    """
    wanted: dict[tuple[str, str], str] = {}  # (from site, target address) -> to site
    for node in topology.nodes.values():
        for router in topology.routers.values():
            wanted[router.site, str(node.mesh)] = node.site
        for peer in topology.nodes.values():
            if "decode" in node.roles and "prefill" in peer.roles:
                for address in _kv_addresses(node, set(peer.models)):
                    wanted[peer.site, address] = node.site
            if peer.store is not None and set(node.models) & set(peer.models):
                wanted[peer.site, str(node.bundles)] = node.site
    crossing = {key: to_site for key, to_site in wanted.items() if key[0] != to_site}
    pairs = dict.fromkeys(frozenset((site, to_site)) for (site, _), to_site in crossing.items())
    links: list[EmulatedLink] = []
    for pair in pairs:
        link = link_between(topology, *sorted(pair))
        assert link.rtt_ms is not None
        assert link.bandwidth_mbps is not None
        links.append(EmulatedLink(link.a, link.b, link.rtt_ms, link.bandwidth_mbps))
    ports = [
        ShapedPort(f"{LOOPBACK}:{take(1)}", target, from_site, to_site)
        for (from_site, target), to_site in crossing.items()
    ]
    return LinkPlan(links, ports)


def with_stores(topology: Topology, named: bool) -> Topology:
    """The stores that nodes use here: those of the file; None where they share the launcher's.

    Where the operator has ``named`` one, all share that, but nodes whose disk has a bound.
    """
    nodes = {
        name: replace(node, store=None) if named and node.disk_gb is None else node
        for name, node in topology.nodes.items()
    }
    return replace(topology, nodes=nodes)


def probes(topology: Topology) -> list[Probe]:
    """One pinned request per node and model that it keeps in memory; see ``make_plan`` for what it
    raises. Of a node where all models come and go the first one is asked for."""
    found = []
    for node in topology.nodes.values():
        kept = node.models if node.memory_gb is None else node.pinned or node.models[:1]
        for model in node.models:
            pair = {
                role: node.name if role in node.roles else _partner(topology, node, role, model)
                for role in ("prefill", "decode")
            }
            if model in kept:
                found.append(Probe(node.name, model, pair["prefill"], pair["decode"]))
    return found


def _partner(topology: Topology, node: Node, role: str, model: str) -> str:
    for other in topology.nodes.values():
        if role in other.roles and model in other.models:
            return other.name
    raise ConfigError(
        f"node {node.name} serves {model} without the role {role}, and no other node has it",
        where=topology.source or None,
        suggestion=f"add {role} to its roles, or a node that does",
    )


def _on_loopback(topology: Topology, take: TakePorts, router_port: int | None) -> Topology:
    nodes = {
        name: replace(
            node,
            mesh=_local(node.mesh, 1, take),
            kv=_local(node.kv, len(node.models), take),
            bundles=_local(node.bundles, 1, take),
        )
        for name, node in topology.nodes.items()
    }
    routers = {
        name: replace(r, listen=_local(r.listen, 1, take)) for name, r in topology.routers.items()
    }
    if router_port is not None:
        name = next(iter(routers))
        routers[name] = replace(routers[name], listen=Address(LOOPBACK, router_port))
    return replace(topology, nodes=nodes, routers=routers)


def _with_threads(topology: Topology, cores: int) -> Topology:
    """Nodes whose threads the file leaves open get each engine's share."""
    nodes = topology.nodes.values()
    engines = sum(len(node.models) for node in nodes if node.device == "cpu")
    given = {
        node.name: replace(node, threads=engine_threads(node, cores, engines)) for node in nodes
    }
    return replace(topology, nodes=given)


def _local(address: Address, count: int, take: TakePorts) -> Address:
    """A loopback address as the file gives it, or free ports."""
    if address.host == LOOPBACK and address.port:
        return address
    return Address(LOOPBACK, take(max(count, 1)))


def _kv_addresses(node: Node, models: set[str]) -> list[str]:
    return [
        f"{node.kv.host}:{node.kv.port + position}"
        for position, model in enumerate(node.models)
        if model in models
    ]


def _node_children(
    topology: Topology,
    files: Files,
    store: Path,
    registry_url: str,
    links: LinkPlan | None,
    drills: bool,
) -> list[Child]:
    children = []
    for node in topology.nodes.values():
        arguments = ["node", node.name, "--topology", str(files.topology)]
        arguments += ["--registry", registry_url, "--store", str(node.store or store)]
        arguments += ["--status-file", str(files.status(node.name))]
        arguments += _dial(files, node.site, links)
        arguments += ["--drills"] if drills else []
        children.append(Child("node", node.name, tuple(arguments), node.mesh))
    return children


def _router_children(
    topology: Topology, files: Files, registry_url: str, links: LinkPlan | None
) -> list[Child]:
    children = []
    for router in topology.routers.values():
        arguments = ["router", "--topology", str(files.topology), "--name", router.name]
        arguments += ["--registry", registry_url, "--listen", str(router.listen)]
        arguments += ["--cache-key", str(files.cache_key)]
        arguments += _dial(files, router.site, links)
        children.append(Child("router", router.name, tuple(arguments), router.listen))
    return children


def _dial(files: Files, site: str, links: LinkPlan | None) -> list[str]:
    return ["--link-map", str(files.link_map(site))] if links and links.dial_map(site) else []
