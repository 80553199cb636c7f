"""Registry servers for the tests: real Consul agents, the embedded one, and broken ones."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Protocol

from registry.embedded import EmbeddedRegistry

PROJECT = Path(__file__).resolve().parents[2]
START_WITHIN_S = 30.0


def consul_binary() -> Path:
    """The binary to test against; a missing one is a failure, never a skip."""
    path = Path(os.environ.get("POPMESH_CONSUL") or PROJECT / ".cache" / "consul" / "consul")
    if not path.is_file():
        raise FileNotFoundError(f"no Consul at {path}: run `make test` or scripts/get_consul.sh")
    return path


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def consul_ports(http: int, serf: int, server: int) -> dict[str, int]:
    """The ``ports`` of an agent's configuration: what is not named here is off."""
    on = {"http": http, "serf_lan": serf, "server": server}
    return on | dict.fromkeys(("https", "grpc", "dns", "serf_wan"), -1)


class ConsulAgent:
    """`consul agent -dev` on loopback: one server, state in memory only, so a restart is empty."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        http, serf, server = free_ports(3)
        self._http = http
        self._config = folder / "agent.json"
        ports = consul_ports(http, serf, server)
        self._config.write_text(json.dumps({"datacenter": "local", "ports": ports}))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"consul://127.0.0.1:{self._http}"

    def start(self) -> None:
        """Start and wait until the agent leads its cluster and has synced itself into it."""
        # No -data-dir: even with -dev the agent would keep its services there.
        command = [consul_binary(), "agent", "-dev", "-node", "test"]
        command += ["-bind", "127.0.0.1", "-client", "127.0.0.1", "-config-file", self._config]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_WITHIN_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError((self._folder / "log").read_text()[-2000:])
            time.sleep(0.05)

    def _ready(self) -> bool:
        url = f"http://127.0.0.1:{self._http}/v1/health/node/test"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(json.load(answer))
        except (urllib.error.URLError, OSError):
            return False

    def pause(self) -> None:
        """Stop it in its tracks: its sockets stay open, nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class ConsulCluster:
    """Three Consul servers on loopback that elect a leader, with Raft's timers as short as it lets
    them be."""

    def __init__(self, folder: Path) -> None:
        ports = free_ports(9)
        self._folder = folder
        self._ports = [tuple(ports[at : at + 3]) for at in (0, 3, 6)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def url(self, number: int) -> str:
        """Of server 0, 1 or 2."""
        return f"consul://127.0.0.1:{self._ports[number][0]}"

    def start(self) -> None:
        """Start all and wait for their leader."""
        for number, (http, serf, server) in enumerate(self._ports):
            config = {
                "node_name": f"server-{number}",
                "datacenter": "local",
                "server": True,
                "bootstrap_expect": 3,
                "retry_join": [f"127.0.0.1:{each[1]}" for each in self._ports],
                "retry_interval": "200ms",
                "performance": {"raft_multiplier": 1},
                "data_dir": str(self._folder / f"data-{number}"),
                "bind_addr": "127.0.0.1",
                "ports": consul_ports(http, serf, server),
            }
            path = self._folder / f"server-{number}.json"
            path.write_text(json.dumps(config))
            with (self._folder / f"log-{number}").open("ab") as log:
                self._processes[number] = subprocess.Popen(
                    [consul_binary(), "agent", "-config-file", path], stdout=log, stderr=log
                )
        deadline = time.monotonic() + START_WITHIN_S
        while any(self.leader(number) is None for number in self._processes):
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError((self._folder / "log-0").read_text()[-2000:])
            time.sleep(0.05)

    def leader(self, asked: int) -> int | None:
        """The leader's number as server ``asked`` has it; None while it knows none."""
        url = f"http://127.0.0.1:{self._ports[asked][0]}/v1/status/leader"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                address = str(json.load(answer))
        except (urllib.error.URLError, OSError):
            return None
        servers = {f"127.0.0.1:{ports[2]}": number for number, ports in enumerate(self._ports)}
        return servers.get(address)

    def kill_server(self, number: int) -> None:
        """End one as a crash would."""
        process = self._processes.pop(number)
        process.kill()
        process.wait()

    def kill(self) -> None:
        """End all that still run."""
        for number in list(self._processes):
            self.kill_server(number)


class Restartable(Protocol):
    """A registry server that comes back empty at the same address."""

    url: str

    async def start(self) -> None: ...
    async def kill(self) -> None: ...


class RestartableConsul:
    """A Consul agent of one test's own."""

    def __init__(self, folder: Path) -> None:
        self._agent = ConsulAgent(folder)
        self.url = self._agent.url

    async def start(self) -> None:
        await asyncio.to_thread(self._agent.start)

    async def kill(self) -> None:
        await asyncio.to_thread(self._agent.kill)


class RestartableEmbedded:
    """The embedded registry, each time a new one on the same port."""

    def __init__(self) -> None:
        (self._port,) = free_ports(1)
        self.url = f"consul://127.0.0.1:{self._port}"
        self._server: EmbeddedRegistry | None = None

    async def start(self) -> None:
        self._server = EmbeddedRegistry(port=self._port)
        await self._server.start()

    async def kill(self) -> None:
        if self._server is not None:
            await self._server.stop()
            self._server = None


class SilentServer:
    """Accepts connections and never answers."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._accepted = asyncio.Event()
        self.url = ""

    async def __aenter__(self) -> SilentServer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"consul://127.0.0.1:{port}"
        return self

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self._accepted.set()

    async def wait_connections(self, count: int) -> None:
        """Wait until so many connections have been made, open or not."""
        while len(self._writers) < count:
            self._accepted.clear()
            await self._accepted.wait()

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()


class CannedServer:
    """Answers every request with the same bytes, then closes the connection."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._server: asyncio.Server | None = None
        self.url = ""

    async def __aenter__(self) -> CannedServer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"consul://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self._answer)
        await writer.drain()
        writer.close()

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()


def http_answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A whole HTTP answer for ``CannedServer``; ``X_Consul_Index=..`` sets that header."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
