"""What only the machine of the mesh itself can do and see: signals, link plans, descriptors.

Reads the ready file of ``popmesh up``; blocking calls take milliseconds.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import msgspec

from popmesh.drill.world import LinkSeen
from popmesh.launcher.ready import ReadyMesh
from popmesh.links.plan import read_link_plan
from wire.errors import ConfigError


class Footprint(msgspec.Struct, frozen=True):
    """One process: open descriptors and resident bytes."""

    pid: int
    descriptors: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class LocalMesh:
    """A mesh that ``popmesh up`` runs here."""

    ready_file: Path

    def read(self) -> ReadyMesh:
        """The ready file as it stands; raises ``ConfigError``."""
        try:
            return msgspec.json.decode(self.ready_file.read_bytes(), type=ReadyMesh)
        except OSError as exc:
            raise ConfigError(
                f"cannot read it: {exc.strerror}",
                where=str(self.ready_file),
                suggestion="name the --ready-file of a 'popmesh up' that runs",
            ) from exc
        except msgspec.DecodeError as exc:
            raise ConfigError(f"no ready file: {exc}", where=str(self.ready_file)) from exc

    def router_urls(self) -> list[str]:
        """Every router, in the topology's order."""
        return [router.url for router in self.read().routers]

    def router_pids(self) -> dict[str, int]:
        """Process ids of the routers by URL."""
        return {router.url: router.pid for router in self.read().routers}

    def links(self) -> tuple[LinkSeen, ...]:
        """The links that are emulated, each with the nodes that some router reaches through it."""
        mesh = self.read()
        if mesh.shaper is None:
            return ()
        homes = {router.site for router in mesh.routers}
        found = []
        for link in read_link_plan(Path(mesh.shaper.plan)).links:
            far = {link.a} if link.b in homes else set()
            far |= {link.b} if link.a in homes else set()
            affected = frozenset(node.name for node in mesh.nodes if node.site in far)
            found.append(LinkSeen(f"{link.a}~{link.b}", affected))
        return tuple(found)

    def footprints(self) -> dict[str, Footprint]:
        """Every process of the mesh that runs, by what it is; empty where there is no /proc."""
        mesh = self.read()
        pids = {f"router {router.name}": router.pid for router in mesh.routers}
        for node in mesh.nodes:
            pids[f"agent {node.name}"] = node.agent_pid
            for engine in node.engines:
                if engine.pid is not None:
                    pids[f"engine {node.name} {engine.model}"] = engine.pid
        if mesh.shaper is not None:
            pids["links"] = mesh.shaper.pid
        found = {name: footprint(pid) for name, pid in pids.items()}
        return {name: seen for name, seen in found.items() if seen is not None}


def footprint(pid: int) -> Footprint | None:
    """What a process holds; None if it cannot be seen. Source: proc(5), fd and statm."""
    try:
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        resident_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return Footprint(pid, descriptors, resident_pages * resource.getpagesize())
