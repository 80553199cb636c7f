"""The ready file, and what the launcher knows of its nodes from their status files.

A node's agent keeps a status file; the launcher reads it, never writes it. The ready file describes
a mesh whose every node has produced a token; after a restart it keeps the old content until that
holds again, and it is replaced by one rename, so readers never see a half or a promise.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from popmesh.launcher.plan import LaunchPlan
from wire.errors import ConfigError


class EngineStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """One engine process; ``pid`` None: not running. ``last_words``: why the last one crashed.
    ``problem``: why its model could not be had or loaded, and is tried again."""

    model: str
    rank: int
    pid: int | None
    last_words: str = ""
    problem: str = ""


class NodeAddresses(msgspec.Struct, frozen=True):
    """Where a node listens; ``kv`` by model."""

    mesh: str
    kv: dict[str, str]


class NodeStatus(msgspec.Struct, frozen=True):
    """What an agent says about itself. ``ready``: every engine has produced a token."""

    agent_pid: int
    ready: bool
    engines: list[EngineStatus]
    addresses: NodeAddresses


class ReadyNode(msgspec.Struct, frozen=True):
    """A node in the ready file."""

    name: str
    site: str
    roles: list[str]
    agent_pid: int
    engines: list[EngineStatus]
    addresses: NodeAddresses


class ReadyRouter(msgspec.Struct, frozen=True):
    """A router process and where it serves."""

    name: str
    site: str
    url: str
    pid: int


class ReadyShaper(msgspec.Struct, frozen=True):
    """The process that emulates the links; ``popmesh.links.control`` changes them in ``plan``."""

    plan: str
    pid: int


class ReadyMesh(msgspec.Struct, frozen=True):
    """The ready file's content. ``router_url`` is the first router's; ``shaper`` may be off."""

    router_url: str
    registry_url: str
    nodes: list[ReadyNode]
    routers: list[ReadyRouter]
    shaper: ReadyShaper | None


def read_status(path: Path, agent_pid: int | None) -> NodeStatus | None:
    """The status file at ``path``, if it is there, whole and of process ``agent_pid``."""
    try:
        status = msgspec.json.decode(path.read_bytes(), type=NodeStatus)
    except (OSError, msgspec.DecodeError):
        return None
    return status if status.agent_pid == agent_pid else None


def told_mistake(status: NodeStatus) -> str | None:
    """What an engine said that no other try would mend: a setting that cannot be."""
    for engine in status.engines:
        kind, colon, text = engine.last_words.partition(": ")
        if colon and kind == ConfigError.__name__:
            return f"{engine.model}: {text}"
    return None


def describe(
    plan: LaunchPlan, statuses: dict[str, NodeStatus], pids: dict[tuple[str, str], int]
) -> ReadyMesh:
    """The ready file's content; ``statuses`` has every node of the plan, ``pids`` every router and
    the shaper by (kind, name)."""
    nodes = [
        ReadyNode(
            node.name,
            node.site,
            sorted(node.roles),
            statuses[node.name].agent_pid,
            statuses[node.name].engines,
            statuses[node.name].addresses,
        )
        for node in plan.topology.nodes.values()
    ]
    routers = [
        ReadyRouter(router.name, router.site, f"http://{router.listen}", pids["router", name])
        for name, router in plan.topology.routers.items()
    ]
    shaper = None
    if plan.links is not None:
        shaper = ReadyShaper(str(plan.files.links), pids["links", "links"])
    return ReadyMesh(plan.router_url, plan.registry_url, nodes, routers, shaper)


def write_ready_file(path: Path, mesh: ReadyMesh) -> None:
    """Replace the file by one rename, after its bytes are on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(mesh)) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
