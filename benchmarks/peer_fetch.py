"""A node fetches a model from two peers over one emulated link, which answer meanwhile.

    python benchmarks/peer_fetch.py --out benchmarks/results/peer_fetch.json --work DIR \
        --store DIR_WITH_SMOLLM2 [--gib 2] [--rounds 5] [--rtt-ms 40] [--mbps 1000] [--nice 0]

Two nodes in one site serve SmolLM2-135M and hold a synthetic model (Llama-3.1-8B's shapes, cut to
``--gib``) that they never load. A third site has an empty store and the link to the first: both
peers together have ``--mbps``. Everything is real but the link, which ``popmesh links`` emulates on
this machine; ``wire`` is what two bare processes get through it with sendfile(2), the ceiling.

*Share of the link* is the bytes of the data file over the time from the first question to peers
until the last chunk is verified and written, over the link's rate; ``named`` also counts what
follows: reading it once more as tensors, and fsync. In turning order with ``wire``.

*ITL* are the gaps between the events of an endless answer of one of the peers, read at the router
while nothing else runs (``quiet``), while ``wire`` pumps the same bytes past the peers (``wire``)
and while both peers give (``giving``): what ``wire`` costs is the emulation's on this machine, not
the peers'. p99 is that of a condition's gaps over all rounds. The answering peer, agent and engine,
has the first core for itself, like a host with a single core; everything that is elsewhere in a
real mesh (the other peer, taker, link, router, client) has the others.

On a machine that others use at the same time (``--nice`` helps a little), look at CPU: that of the
answering peer's engine per token and of its agent per GB given. Where both have one core for
themselves, agent's share of it plus the engine's increase is what giving adds to ITL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop
from warm_start import shapes, write_source

from pop_node.peers.bring import Bringing
from pop_node.peers.bringer import Bringer
from pop_node.peers.client import Dialing
from pop_node.store.store import Store
from popmesh.links.plan import (
    EmulatedLink,
    LinkMap,
    LinkPlan,
    ShapedPort,
    read_link_map,
    write_json,
)
from popmesh.sse import SseParser
from registry.client import Registry
from registry.entries import ServiceEntry
from topology.load import load_topology
from wire.address import Dialer

PEERS = ("peer-1", "peer-2")
ANSWERING = PEERS[0]
TAKER = "taker-1"
SERVED, GIVEN = "smollm2-135m", "big"
GIVE_MBPS = 1000.0
"""Of each peer: a busy one halves it, and both together still fill the link."""

ANSWER_TOKENS = 2000
WARM_UP_S = 3.0
TIMEOUT_S = 300.0

SENDER = """
import os, socket, sys, threading
path, nbytes = sys.argv[2], int(sys.argv[3])
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
def send(peer):
    with open(path, "rb") as file:
        begin = int(peer.recv(16))
        end = begin + nbytes
        while begin < end:
            begin += os.sendfile(peer.fileno(), file.fileno(), begin, end - begin)
    peer.recv(1)
while True:
    threading.Thread(target=send, args=(server.accept()[0],), daemon=True).start()
"""
"""A bare peer: whoever connects says where to begin and gets so many bytes of a file."""

WIRE_LINES = 2
"""Connections to each bare peer, as many as the taker has to a real one."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


# ---- the mesh ----------------------------------------------------------------------------------


class World:
    """All processes of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, Path(args.work)
        self.cores = sorted(os.sched_getaffinity(0))
        ports = iter(free_ports(16))
        self.url = f"http://127.0.0.1:{next(ports)}"
        self.registry = f"127.0.0.1:{next(ports)}"
        self.bundles = {name: f"127.0.0.1:{next(ports)}" for name in PEERS}
        self.far = {name: f"127.0.0.1:{next(ports)}" for name in PEERS}  # as the taker dials them
        self.wire = {name: next(ports) for name in PEERS}
        self.far_wire = {name: f"127.0.0.1:{next(ports)}" for name in PEERS}
        self.topology, self.link_map = self.work / "mesh.yaml", self.work / "links-taker.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.answering: subprocess.Popen[bytes]
        self.store = Store(self.work / "give")

    def prepare(self) -> None:
        """Both models into the peers' store, once per ``--work``."""
        source = self.work / "big-source"
        bundle = Store(Path(self.args.store)).get(SERVED).path.resolve()
        if not any(row.name == GIVEN for row in self.store.rows()):
            write_source(source, shapes(self.args.gib))
            shutil.copy(bundle / "tokenizer.json", source)  # nodes read it of every model
            self.store.add(str(source), GIVEN, "bfloat16", lambda *_: None)
        shutil.rmtree(source, ignore_errors=True)
        self.store.add(f"file://{bundle}", SERVED, None, lambda *_: None)
        nodes = "".join(
            f"  {name}: {{site: ams, models: [{SERVED}, {GIVEN}], pinned: [{SERVED}], "
            f"memory_gb: 1.2, kv_tokens: 8192, bundles: '{self.bundles[name]}', "
            f"give_mbps: {GIVE_MBPS}}}\n"
            for name in PEERS
        )
        self.topology.write_text(
            f"mesh: fetch\nmodels: {{{SERVED}: {{}}, {GIVEN}: {{}}}}\n"
            "sites:\n  ams: {lat: 52.31, lon: 4.76, region: eu}\n"
            "  ord: {lat: 41.98, lon: -87.90, region: na}\n"
            f"links: [{{between: [ams, ord], rtt_ms: {self.args.rtt_ms}, "
            f"bandwidth_mbps: {self.args.mbps}}}]\n"
            f"nodes:\n{nodes}"
            f"  {TAKER}: {{site: ord, models: [{GIVEN}], memory_gb: 0.001}}\n"
            f"routers: {{router-ams: {{site: ams, listen: '{self.url[7:]}'}}}}\n"
        )
        pairs = list(zip(self.far.values(), self.bundles.values(), strict=True))
        pairs += [(self.far_wire[name], f"127.0.0.1:{self.wire[name]}") for name in PEERS]
        write_json(
            self.work / "shaper.json",
            LinkPlan(
                [EmulatedLink("ams", "ord", self.args.rtt_ms, self.args.mbps)],
                [ShapedPort(listen, target, "ord", "ams") for listen, target in pairs],
            ),
        )
        write_json(self.link_map, LinkMap({t: listen for listen, t in pairs}))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Registry, link, bare senders, peers and router; all ended afterwards."""
        near, far = self.cores[:1], self.cores[1:] or self.cores
        common = ("--topology", str(self.topology), "--registry", f"consul://{self.registry}")
        try:
            self._popmesh(far, "registry", "--listen", self.registry)
            self._popmesh(far, "links", "--plan", str(self.work / "shaper.json"))
            data = self.store.get(GIVEN)
            path = str(data.path / data.manifest.data.name)
            share = data.manifest.data.nbytes // (len(PEERS) * WIRE_LINES)
            for name in PEERS:
                sender = [sys.executable, "-c", SENDER, str(self.wire[name]), path, str(share)]
                self._start(far, sender)
                cores = near if name == ANSWERING else far
                self._popmesh(cores, "node", name, *common, "--store", str(self.store.root))
                if name == ANSWERING:
                    self.answering = self.processes[-1]
            self._popmesh(far, "router", "--name", "router-ams", *common)
            self._wait_ready()
            yield
        finally:
            for process in reversed(self.processes):
                process.send_signal(signal.SIGTERM)
            for process in self.processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()

    def _popmesh(self, cores: list[int], *arguments: str) -> None:
        self._start(cores, [sys.executable, "-m", "popmesh", *arguments])

    def _start(self, cores: list[int], command: list[str]) -> None:
        log = (self.work / f"{len(self.processes)}.log").open("wb")
        allowed = ",".join(map(str, cores))
        self.processes.append(
            subprocess.Popen(["taskset", "-c", allowed, *command], stdout=log, stderr=log)
        )

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
            if any(process.poll() is not None for process in self.processes):
                break
            time.sleep(0.2)
        raise RuntimeError(f"the mesh did not become ready: see the logs in {self.work}")

    def cpu_s(self) -> dict[str, float]:
        """Of the answering peer: its agent and its engines, since they started."""
        agent = psutil.Process(self.answering.pid)
        engines = agent.children(recursive=True)
        return {
            "agent": sum(agent.cpu_times()[:2]),
            "engine": sum(sum(engine.cpu_times()[:2]) for engine in engines),
        }

    # ---- what is measured ----------------------------------------------------------------------

    def pump(self) -> dict[str, float]:
        """The same bytes from bare senders."""
        share = self.store.get(GIVEN).manifest.data.nbytes // (len(PEERS) * WIRE_LINES)
        return self._far("--pump", *self.far_wire.values(), str(share))

    def fetch(self) -> dict[str, float]:
        """A taker of its own fetches the bundle into an empty store."""
        return self._far("--taker", self.registry)

    def _far(self, *arguments: str) -> dict[str, float]:
        """In a process of its own, far from the peers."""
        far = ",".join(map(str, self.cores[1:] or self.cores))
        command = ["taskset", "-c", far, sys.executable, __file__, "--work", str(self.work)]
        done = subprocess.run(
            [*command, *arguments], stdout=subprocess.PIPE, check=True, timeout=TIMEOUT_S
        )
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found


# ---- answers meanwhile -------------------------------------------------------------------------


class Answers:
    """Endless answers of one peer, one after the other; ``gaps_ms`` says how evenly they come."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._stop = threading.Event()
        self._answers: list[list[float]] = []  # moments of the events of each
        self._error: BaseException | None = None

    def __enter__(self) -> Answers:
        self._thread.start()
        time.sleep(WARM_UP_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def gaps_ms(self, begin: float, end: float) -> list[float]:
        """Of all answers between two moments of the monotonic clock."""
        gaps = []
        for times in list(self._answers):
            inside = [at for at in list(times) if begin <= at <= end]
            gaps += [(b - a) * 1000 for a, b in pairwise(inside)]
        return gaps

    async def _run(self) -> None:
        try:
            async with aiohttp.ClientSession() as session:
                await self._read(session, ANSWERING)
        except (aiohttp.ClientError, OSError) as exc:  # handed to the thread that waits
            self._error = exc

    async def _read(self, session: aiohttp.ClientSession, name: str) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            times: list[float] = []
            self._answers.append(times)
            body = {
                "model": SERVED,
                "prompt": f"Story {number} of {name}: once upon a time",
                "max_tokens": ANSWER_TOKENS,
                "ignore_eos": True,
                "stream": True,
            }
            headers = {"x-popmesh-route": f"prefill={name},decode={name}"}
            url = f"{self._url}/v1/completions"
            async with session.post(url, json=body, headers=headers) as answer:
                answer.raise_for_status()
                events = SseParser()
                async for chunk in answer.content.iter_any():
                    times += [time.monotonic()] * len(events.feed(chunk))
                    if self._stop.is_set():
                        return


# ---- the taker ---------------------------------------------------------------------------------


async def take_bundle(work: Path, registry_address: str) -> dict[str, float]:
    """Bring the given model into an empty store; seconds from the first question to peers."""
    store = work / "taken"
    shutil.rmtree(store, ignore_errors=True)
    mesh = load_topology(work / "mesh.yaml")
    dialing = Dialing(
        TAKER, Dialer(read_link_map(work / "links-taker.json")), None, lambda *_: None
    )
    fetched_at = 0.0
    nbytes = 0

    def watch(bringing: Bringing) -> None:
        nonlocal fetched_at, nbytes
        if bringing.phase in ("fetch", "verify") and not fetched_at:
            nbytes = bringing.total_bytes if bringing.phase == "fetch" else nbytes
            if bringing.phase == "verify":
                fetched_at = time.monotonic()

    async with Registry.connect(f"consul://{registry_address}") as registry:

        async def entries() -> tuple[ServiceEntry, ...]:
            return (await registry.services("popmesh-node")).entries

        bringer = Bringer(Store(store), mesh.nodes[TAKER], mesh, entries, dialing)
        cpu, begin = time.process_time(), time.monotonic()
        await bringer.bring(GIVEN, watch)
        end = time.monotonic()
        bringer.close()
    return {
        "bytes": nbytes,
        "seconds": fetched_at - begin,
        "named_seconds": end - begin,
        "cpu_seconds": time.process_time() - cpu,
    }


def pump(addresses: list[str], share: int) -> dict[str, float]:
    """Read ``share`` bytes from bare senders over each of ``WIRE_LINES`` connections."""

    def take(address: str, begin: int) -> None:
        host, port = address.split(":")
        buffer, left = bytearray(1 << 20), share
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(str(begin).encode())
            while left:
                left -= sock.recv_into(buffer)
            sock.sendall(b".")

    threads = [
        threading.Thread(target=take, args=(address, number * share))
        for number, address in enumerate(addresses * WIRE_LINES)
    ]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"bytes": share * len(threads), "seconds": time.monotonic() - begin}


# ---- the whole ---------------------------------------------------------------------------------


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def measure(world: World, rounds: int) -> dict[str, Any]:
    """Raw samples."""
    link_s = world.args.gib * 2**30 * 8 / world.args.mbps / 1e6

    def rest() -> dict[str, float]:
        time.sleep(link_s)
        return {}

    acts: dict[str, Callable[[], dict[str, float]]] = {"wire": world.pump, "giving": world.fetch}
    every = {"quiet": rest} | acts
    alone: dict[str, list[dict[str, float]]] = {name: [] for name in acts}
    meanwhile: dict[str, list[dict[str, Any]]] = {name: [] for name in ("quiet", *acts)}
    for number in range(rounds):
        order = list(acts) if number % 2 else list(reversed(acts))
        for name in order:
            alone[name].append(acts[name]() | {"machine_load": os.getloadavg()[0]})
            print("alone", name, alone[name][-1], flush=True)
        with Answers(world.url) as answers:
            for name in [*every][number % 3 :] + [*every][: number % 3]:
                begin, cpu_before = time.monotonic(), world.cpu_s()
                found: dict[str, Any] = dict(every[name]())
                end, cpu_after = time.monotonic(), world.cpu_s()
                cpu_s = {who: cpu_after[who] - cpu_before[who] for who in cpu_after}
                count = max(1, len(answers.gaps_ms(begin, end)))
                found["cpu_ms_per_token"] = {w: s / count * 1e3 for w, s in cpu_s.items()}
                found["machine_load"] = os.getloadavg()[0]
                found["agent_cpu_s"] = cpu_s["agent"]
                if name == "giving":  # without the start of the taker's process
                    begin = end - found["named_seconds"]
                    end = begin + found["seconds"]
                found["gaps_ms"] = [round(gap, 2) for gap in answers.gaps_ms(begin, end)]
                meanwhile[name].append(found)
                p99 = percentile(found["gaps_ms"], 0.99)
                print(
                    "answering", name, f"{len(found['gaps_ms'])} gaps, p99 {p99:.1f} ms", flush=True
                )
    return {"alone": alone, "answering": meanwhile}


def summary(samples: dict[str, Any], mbps: float) -> dict[str, Any]:
    """Medians of shares of the link; percentiles of gaps of all rounds."""
    link = mbps * 1e6 / 8
    shares = {
        when: {
            name: statistics.median(s["bytes"] / s["seconds"] / link for s in samples[when][name])
            for name in ("wire", "giving")
        }
        for when in ("alone", "answering")
    }
    for when, by_name in shares.items():
        by_name["named"] = statistics.median(
            s["bytes"] / s["named_seconds"] / link for s in samples[when]["giving"]
        )
    gaps = {
        name: [gap for s in found for gap in s["gaps_ms"]]
        for name, found in samples["answering"].items()
    }
    itl = {
        name: {f"p{p}": round(percentile(found, p / 100), 2) for p in (50, 90, 99)}
        for name, found in gaps.items()
    }
    cpu = {
        name: {
            who: statistics.median(s["cpu_ms_per_token"][who] for s in found)
            for who in ("agent", "engine")
        }
        for name, found in samples["answering"].items()
    }
    return {
        "engine_cpu_ms_per_token": {name: found["engine"] for name, found in cpu.items()},
        "agent_cpu_s_per_gbyte_given": statistics.median(
            s["agent_cpu_s"] / (s["bytes"] / len(PEERS)) * 1e9
            for s in samples["answering"]["giving"]
        ),
        "share_of_link": shares,
        "itl_ms": itl,
        "itl_p99_giving_over_quiet": itl["giving"]["p99"] / itl["quiet"]["p99"],
        "itl_p99_wire_over_quiet": itl["wire"]["p99"] / itl["quiet"]["p99"],
        "itl_p99_giving_over_wire": itl["giving"]["p99"] / itl["wire"]["p99"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", required=True)
    parser.add_argument("--store")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rtt-ms", type=float, default=40.0)
    parser.add_argument("--mbps", type=float, default=1000.0)
    parser.add_argument("--nice", type=int, default=0, help="of all processes, where others work")
    parser.add_argument("--taker", help=argparse.SUPPRESS)
    parser.add_argument("--pump", nargs=len(PEERS) + 1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.taker is not None:
        print(json.dumps(uvloop.run(take_bundle(Path(args.work), args.taker))))
        return
    if args.pump is not None:
        print(json.dumps(pump(args.pump[:-1], int(args.pump[-1]))))
        return
    if args.out is None or args.store is None:
        parser.error("--out and --store are needed")
    os.nice(args.nice)
    world = World(args)
    world.prepare()
    with world.running():
        samples = measure(world, args.rounds)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    report = {
        "what": (__doc__ or "").splitlines()[0],
        "commit": done.stdout.strip(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "link": {"mbps": args.mbps, "rtt_ms": args.rtt_ms},
        "give_mbps_per_peer": GIVE_MBPS,
        "nice": args.nice,
        "bundle_bytes": world.store.get(GIVEN).manifest.data.nbytes,
        "summary": summary(samples, args.mbps),
        "samples": samples,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
