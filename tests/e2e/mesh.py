"""A real mesh of real processes for end-to-end tests, started through ``popmesh up``."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

START_TIMEOUT_S = 180.0


@dataclass
class Mesh:
    """A running ``popmesh up``."""

    process: subprocess.Popen[bytes]
    ready_file: Path
    log: Path

    @property
    def ready(self) -> dict[str, Any]:
        """The ready file as it stands now."""
        return json.loads(self.ready_file.read_text())

    @property
    def url(self) -> str:
        return str(self.ready["router_url"])

    def status(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/popmesh/status", timeout=10).raise_for_status().json()

    def request_record(self, request_id: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/popmesh/requests/{request_id}", timeout=10)
        return answer.raise_for_status().json()

    def explain(self, body: dict[str, Any]) -> dict[str, Any]:
        """The route that the router would choose for a chat body."""
        answer = httpx.post(f"{self.url}/popmesh/explain", json=body, timeout=10)
        return answer.raise_for_status().json()["route"]

    def pids(self, name: str) -> tuple[int, int]:
        """(agent, engine) process ids of a node."""
        node = next(n for n in self.ready["nodes"] if n["name"] == name)
        return node["agent_pid"], node["engines"][0]["pid"]

    async def wait_reborn(self, name: str, old_engine: int) -> None:
        """Until the node has another engine and every node serves."""
        for _ in range(600):
            if self.ready_file.exists() and self.pids(name)[1] != old_engine:
                nodes = self.status()["nodes"]
                ready = all(e["ready"] for n in nodes for e in n["engines"])
                if len(nodes) == len(self.ready["nodes"]) and ready:
                    return
            await asyncio.sleep(0.1)
        raise AssertionError(f"not ready again: {self.status()}")

    def stop(self) -> None:
        """End it the way a user does, and check that nothing is left behind."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        finally:
            left = [child for child in children if child.is_running()]
            left = [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
            for child in left:
                child.kill()
            if self.process.poll() is None:
                self.process.kill()
        assert not left, f"left behind: {left}"


def complete_at(
    url: str, prompt: str, max_tokens: int, prefill: str, decode: str
) -> httpx.Response:
    """The greedy answer of a pair of nodes in bfloat16, of just so many tokens."""
    answer = httpx.post(
        f"{url}/v1/completions",
        json={
            "model": "smollm2-135m",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        },
        headers={"x-popmesh-route": f"prefill={prefill},decode={decode}"},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    return answer


def start_mesh(topology: Path, store: Path, directory: Path, *options: str) -> Mesh:
    """Start ``popmesh up`` and wait until its ready file is there; raises with its log if not."""
    directory.mkdir(parents=True, exist_ok=True)
    ready_file, log = directory / "ready.json", directory / "up.log"
    command = [sys.executable, "-m", "popmesh", "up", str(topology)]
    command += ["--ready-file", str(ready_file), "--store", str(store)]
    command += ["--log-dir", str(directory / "logs"), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=dict(os.environ)
        )
    mesh = Mesh(process, ready_file, log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            logs = [log, *sorted((directory / "logs").glob("*"))]
            tails = "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in logs)
            raise AssertionError(f"the mesh did not become ready\n{tails}")
        time.sleep(0.05)
    return mesh
