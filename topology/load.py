"""Reads an operator's topology file, strictly: a file that loads can be acted on.

Every mistake carries file and line, and one reading reports all of them (the first twenty). The
work is in ``topology.reading``: YAML as a notation (``yaml_nodes``), typed values (``fields``),
names (``names``) and the sections (``places``, ``fleet``, ``access``).
"""

from __future__ import annotations

from pathlib import Path

from topology.dump import dump_topology
from topology.model import DETECTION_S, Topology
from topology.reading.access import read_tenants, read_trusted_networks
from topology.reading.fields import Fields
from topology.reading.fleet import read_models, read_nodes, read_placement, read_routers
from topology.reading.listeners import Listeners
from topology.reading.names import Names, check_name
from topology.reading.places import read_defaults, read_links, read_sites
from topology.reading.problems import Problems
from topology.reading.yaml_nodes import MAX_BYTES, Entry, read_yaml
from wire.errors import ConfigError

__all__ = ["dump_topology", "load_topology", "parse_topology"]

_TOP = (
    "mesh",
    "models",
    "sites",
    "nodes",
    "routers",
    "links",
    "tenants",
    "trusted_networks",
    "defaults",
    "detection_s",
    "placement",
)

MIN_DETECTION_S = 1.0
MAX_DETECTION_S = 60.0
"""Below the first, every pause of a busy host is a death; beyond the second, nobody waits."""


def load_topology(path: Path) -> Topology:
    """Read and check the topology file at ``path``; raises ``ConfigError`` with file and line."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as exc:
        message = f"cannot read the topology: {exc.strerror or exc}"
        raise ConfigError(message, where=str(path)) from exc
    if len(data) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES >> 20} MiB", where=f"{path}:1")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError("not UTF-8 text", where=f"{path}:{line}") from exc
    return parse_topology(text, str(path))


def parse_topology(text: str, source: str) -> Topology:
    """Check ``text`` as a topology; ``source`` names it in errors (``source:line``).

    A relative ``store`` is taken from the folder of ``source``; in the result it is absolute. A
    node without ``models`` gets all that may run in its site's region. Raises ``ConfigError`` that
    lists the mistakes by line, with the first one's in ``where``.
    """
    problems = Problems(source)
    top = Fields(Entry(1, read_yaml(text, problems)), _TOP, problems)
    mesh = top.text("mesh")
    if mesh and (found := top.entry("mesh")):
        check_name(mesh, found.value.line, problems)
    names = Names(top)
    listeners = Listeners(problems)
    sites = read_sites(names)
    models = read_models(names)
    topology = Topology(
        mesh=mesh,
        models=models,
        sites=sites,
        nodes=read_nodes(names, sites, models, listeners, Path(source).parent),
        routers=read_routers(names, listeners),
        links=read_links(top, names),
        tenants=read_tenants(names),
        trusted_networks=read_trusted_networks(top),
        defaults=read_defaults(top),
        detection_s=top.number("detection_s", MIN_DETECTION_S, MAX_DETECTION_S, DETECTION_S),
        placement=read_placement(top),
        source=source,
    )
    problems.raise_if_any()
    return topology
