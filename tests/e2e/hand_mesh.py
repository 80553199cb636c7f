"""A mesh whose processes are started one by one on this machine, each node with a store of its own.

An embedded registry, nodes with ``--drills``, one router. Addresses in the topology are filled in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.registry.registry_servers import free_ports

START_TIMEOUT_S = 120.0
WAIT_S = 60.0
"""Longest wait for something that takes seconds here, on a machine that others use."""


class HandMesh:
    """Processes by name: ``registry``, ``router`` and the nodes'."""

    def __init__(self, directory: Path, topology: dict[str, Any], stores: dict[str, Path]) -> None:
        """``topology`` is what the YAML file says, without addresses; ``stores`` is by node."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.stores = directory, stores
        nodes, routers = topology["nodes"], topology["routers"]
        listeners = ("mesh", "kv", "bundles")
        span = 1 + max(len(topology["models"]), 1)  # each model has a KV listener
        ports = iter(free_ports(len(nodes) * (len(listeners) + span) + 2))
        for node in nodes.values():
            node |= {key: f"127.0.0.1:{next(ports)}" for key in listeners}
            node["kv"] = "127.0.0.1:0"
        (self.router_name,) = routers
        self.url = f"http://127.0.0.1:{next(ports)}"
        routers[self.router_name]["listen"] = self.url.removeprefix("http://")
        self.registry = f"127.0.0.1:{next(ports)}"
        self.topology = directory / "mesh.yaml"
        self.topology.write_text(yaml.safe_dump(topology, sort_keys=False))
        self.processes: dict[str, psutil.Popen] = {}

    def start(self) -> None:
        """Everything, and wait until the router has a route."""
        self._run("registry", "registry", "--listen", self.registry)
        for name in self.stores:  # one after the other: the first ones are known to the next
            self.start_node(name)
            self.wait_until(lambda name=name: self._is_serving(name), START_TIMEOUT_S)
        self._run("router", "router", *self._common(), "--name", self.router_name)
        self.wait_until(self._is_ready, START_TIMEOUT_S)

    def start_node(self, name: str) -> None:
        """Start one node; does not wait."""
        status = ("--status-file", str(self.directory / f"{name}.json"), "--drills")
        store = ("--store", str(self.stores[name]))
        self._run(name, "node", name, *self._common(), *store, *status)

    def _common(self) -> tuple[str, ...]:
        return ("--topology", str(self.topology), "--registry", f"consul://{self.registry}")

    def _run(self, name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "popmesh", *arguments]
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = psutil.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=dict(os.environ)
            )

    def _is_serving(self, name: str) -> bool:
        status = self.directory / f"{name}.json"
        return status.exists() and json.loads(status.read_text())["ready"]

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End every process and all it started."""
        for process in self.processes.values():
            for child in process.children(recursive=True):
                child.kill()
            process.kill()
        for process in self.processes.values():
            process.wait(10)

    # ---- looking -------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The router's."""
        answer = httpx.get(f"{self.url}/popmesh/status", timeout=10)
        found: dict[str, Any] = answer.raise_for_status().json()
        return found

    def warmth(self, node: str) -> dict[str, str]:
        """By model, as the router heard it."""
        for seen in self.status()["nodes"]:
            if seen["name"] == node:
                return {engine["model"]: engine["warmth"] for engine in seen["engines"]}
        return {}

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Until ``holds()``; raises with every log when it does not, or when a process ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if holds():
                return
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended\n{self.log(name)}"
            time.sleep(0.1)
        logs = "\n".join(f"== {name}\n{self.log(name)[-4000:]}" for name in self.processes)
        raise AssertionError(f"it does not come\n{logs}")

    def log(self, name: str) -> str:
        """What a process wrote."""
        return (self.directory / f"{name}.log").read_text()


@contextmanager
def hand_mesh(
    directory: Path, topology: dict[str, Any], stores: dict[str, Path]
) -> Iterator[HandMesh]:
    """A running mesh; every process of it is gone afterwards."""
    mesh = HandMesh(directory, topology, stores)
    try:
        mesh.start()
        yield mesh
    finally:
        mesh.stop()
