"""The mesh in which ``peer_fetch.py`` measures: two peers, a link, a router, and who waits where.

Two nodes in one site serve SmolLM2-135M and hold a synthetic model that they never load. A third
site has the link to the first; both peers together have its bandwidth. Everything is real but the
link, which ``popmesh links`` emulates on this machine.

The answering peer, agent and engine, has the first core for itself, like a host with a single core.
Everything that is elsewhere in a real mesh has the others; there the router and whoever reads
answers run before all else (SCHED_RR), because in a real mesh no taker and no emulated link takes
their processor. That needs root, or CAP_SYS_NICE.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from common.ports import free_ports
from common.synthetic_model import shapes, write_source

from pop_node.store.store import Store
from popmesh.links.plan import EmulatedLink, LinkMap, LinkPlan, ShapedPort, write_json

PEERS = ("peer-1", "peer-2")
ANSWERING = PEERS[0]
TAKER = "taker-1"
SERVED, GIVEN = "smollm2-135m", "big"
GIVE_MBPS = 1000.0
"""Of each peer: a busy one halves it, and both together still fill the link."""

TIMEOUT_S = 300.0
HERE = Path(__file__).parent
TOPOLOGY, LINK_MAP = "mesh.yaml", "links-taker.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """``work``: a directory that is kept from run to run; ``served``: a store with ``SERVED``."""

    work: Path
    served: Path
    gib: float
    rtt_ms: float
    mbps: float

    @property
    def link_bytes_per_s(self) -> float:
        """What the link carries."""
        return self.mbps * 1e6 / 8


class World:
    """All processes of one run."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.work = settings, settings.work
        cores = sorted(os.sched_getaffinity(0))
        self._near, self._far = cores[:1], cores[1:] or cores
        ports = iter(free_ports(16))
        self.url = f"http://127.0.0.1:{next(ports)}"
        self._registry = f"127.0.0.1:{next(ports)}"
        self._bundles = {name: f"127.0.0.1:{next(ports)}" for name in PEERS}
        self._wire = {name: next(ports) for name in PEERS}
        self._far_bundles = {name: f"127.0.0.1:{next(ports)}" for name in PEERS}
        self._far_wire = {name: f"127.0.0.1:{next(ports)}" for name in PEERS}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._answering: subprocess.Popen[bytes]
        self._link: subprocess.Popen[bytes]
        self.store = Store(self.work / "give")

    # ---- what is there before ------------------------------------------------------------------

    def prepare(self) -> None:
        """Both models into the peers' store, once per ``work``; topology and link of this run."""
        source = self.work / "big-source"
        bundle = Store(self.settings.served).get(SERVED).path.resolve()
        if not any(row.name == GIVEN for row in self.store.rows()):
            write_source(source, shapes(self.settings.gib))
            shutil.copy(bundle / "tokenizer.json", source)  # nodes read it of every model
            self.store.add(str(source), GIVEN, "bfloat16", lambda *_: None)
        shutil.rmtree(source, ignore_errors=True)
        self.store.add(f"file://{bundle}", SERVED, None, lambda *_: None)
        self._write_topology()
        self._write_link()

    def _write_topology(self) -> None:
        settings = self.settings
        nodes = "".join(
            f"  {name}: {{site: ams, models: [{SERVED}, {GIVEN}], pinned: [{SERVED}], "
            f"memory_gb: 1.2, kv_tokens: 8192, bundles: '{self._bundles[name]}', "
            f"give_mbps: {GIVE_MBPS}}}\n"
            for name in PEERS
        )
        (self.work / TOPOLOGY).write_text(
            f"mesh: fetch\nmodels: {{{SERVED}: {{}}, {GIVEN}: {{}}}}\n"
            "sites:\n  ams: {lat: 52.31, lon: 4.76, region: eu}\n"
            "  ord: {lat: 41.98, lon: -87.90, region: na}\n"
            f"links: [{{between: [ams, ord], rtt_ms: {settings.rtt_ms}, "
            f"bandwidth_mbps: {settings.mbps}}}]\n"
            f"nodes:\n{nodes}"
            f"  {TAKER}: {{site: ord, models: [{GIVEN}], memory_gb: 0.001}}\n"
            f"routers: {{router-ams: {{site: ams, listen: '{self.url[7:]}'}}}}\n"
        )

    def _write_link(self) -> None:
        pairs = [(self._far_bundles[name], self._bundles[name]) for name in PEERS]
        pairs += [(self._far_wire[name], f"127.0.0.1:{self._wire[name]}") for name in PEERS]
        write_json(
            self.work / "shaper.json",
            LinkPlan(
                [EmulatedLink("ams", "ord", self.settings.rtt_ms, self.settings.mbps)],
                [ShapedPort(listen, target, "ord", "ams") for listen, target in pairs],
            ),
        )
        write_json(self.work / LINK_MAP, LinkMap({target: listen for listen, target in pairs}))

    # ---- processes -----------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Registry, link, bare senders, peers and router; all ended afterwards."""
        common = ("--topology", str(self.work / TOPOLOGY), "--registry", self._consul)
        try:
            self._popmesh(self._far, "registry", "--listen", self._registry)
            plan = str(self.work / "shaper.json")
            self._link = self._popmesh(self._far, "links", "--plan", plan)
            data = self.store.get(GIVEN)
            path = str(data.path / data.manifest.data.name)
            for name in PEERS:
                sender = [sys.executable, str(HERE / "peer_fetch_wire.py"), str(self._wire[name])]
                self._start(self._far, [*sender, path])
                cores = self._near if name == ANSWERING else self._far
                node = self._popmesh(cores, "node", name, *common, "--store", str(self.store.root))
                if name == ANSWERING:
                    self._answering = node
            self._popmesh(self._far, "router", "--name", "router-ams", *common, first=True)
            self._wait_ready()
            yield
        finally:
            for process in reversed(self._processes):
                process.send_signal(signal.SIGTERM)
            for process in self._processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()
                process.wait()

    @property
    def _consul(self) -> str:
        return f"consul://{self._registry}"

    def _popmesh(
        self, cores: list[int], *arguments: str, first: bool = False
    ) -> subprocess.Popen[bytes]:
        return self._start(cores, [sys.executable, "-m", "popmesh", *arguments], first=first)

    def _start(
        self, cores: list[int], command: list[str], *, first: bool = False
    ) -> subprocess.Popen[bytes]:
        with (self.work / f"{len(self._processes)}.log").open("wb") as log:
            process = subprocess.Popen(placed(cores, command, first), stdout=log, stderr=log)
        self._processes.append(process)
        return process

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            with suppress(urllib.error.URLError, ConnectionError):
                status = json.load(urllib.request.urlopen(f"{self.url}/popmesh/status"))
                ready = {
                    node["name"]
                    for node in status["nodes"]
                    for engine in node["engines"]
                    if engine["model"] == SERVED and engine["ready"]
                }
                if set(PEERS) <= ready:
                    return
            if any(process.poll() is not None for process in self._processes):
                break
            time.sleep(0.2)
        raise RuntimeError(f"the mesh did not become ready: see the logs in {self.work}")

    def cpu_s(self) -> dict[str, float]:
        """Since they started: the answering peer's agent and engines, and the emulated link."""
        agent = psutil.Process(self._answering.pid)
        engines = agent.children(recursive=True)
        link = psutil.Process(self._link.pid)
        return {
            "agent": sum(agent.cpu_times()[:2]),
            "engine": sum(sum(engine.cpu_times()[:2]) for engine in engines),
            "link": sum(link.cpu_times()[:2]),
        }

    # ---- what is measured ----------------------------------------------------------------------

    def pump(self) -> dict[str, float]:
        """The bytes of the given model from bare senders."""
        nbytes = str(self.store.get(GIVEN).manifest.data.nbytes)
        return self._taken("peer_fetch_wire.py", "--take", nbytes, *self._far_wire.values())

    def fetch(self) -> dict[str, float]:
        """A taker of its own fetches the bundle into an empty store."""
        return self._taken("peer_fetch_taker.py", str(self.work), self._consul)

    def answers(self) -> subprocess.Popen[bytes]:
        """Whoever reads endless answers of the answering peer, see ``peer_fetch_answers.py``."""
        script = str(HERE / "peer_fetch_answers.py")
        return subprocess.Popen(
            placed(self._far, [sys.executable, script, self.url, SERVED, ANSWERING], True),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def _taken(self, script: str, *arguments: str) -> dict[str, float]:
        """In a process of its own, far from the peers."""
        command = placed(self._far, [sys.executable, str(HERE / script), *arguments])
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_S)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found


def placed(cores: list[int], command: list[str], first: bool = False) -> list[str]:
    """``command`` on these cores; ``first``: before everything that is there as usual."""
    urgent = ["chrt", "--rr", "1"] if first else []
    return ["taskset", "-c", ",".join(map(str, cores)), *urgent, *command]
