"""CPU that the router spends per SSE event and per small request, next to a plain HTTP proxy.

    python benchmarks/router_cpu.py --out benchmarks/results/router.json [--rounds 5] \\
        [--seconds 6] [--before CHECKOUT]

The peer is the least that a router over HTTP backends could do in the same language: an aiohttp
proxy on uvloop that passes bytes on. Both serve the same events, made by a process that stands in
for nodes (mesh wire) or for an OpenAI backend (HTTP). These three are in
``parts/router_stand_ins.py``, who asks them in ``parts/router_clients.py``.

Loads: ``small``: 16 clients, answers of one token, not streamed. ``stream``: 32 clients, 128 tokens
a stream, a step every 20 ms, on one node. ``stream_split``: the same with prefill and decode on two
nodes (router only). CPU is the growth of ``/proc/PID/task/*/schedstat`` over the measured window,
divided by the events or requests that clients received in it. Rounds alternate between the two,
or three: ``--before`` adds the router of another checkout, to see what a change costs.
"""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop
from common.ports import free_ports
from common.report import command_line, commit, facts, save
from parts.router_clients import LOADS, WARM_S, measure
from parts.router_stand_ins import MODEL

START_TIMEOUT_S = 60.0

TOPOLOGY = """
mesh: bench
models:
  mock: {source: "none"}
sites:
  here: {lat: 0, lon: 0, region: none}
nodes:
  n1: {site: here, mesh: "127.0.0.1:1", kv: "127.0.0.1:2"}
  n2: {site: here, mesh: "127.0.0.1:3", kv: "127.0.0.1:4"}
routers:
  r: {site: here}
  before: {site: here}
"""


@contextlib.contextmanager
def started(*command: str, log: Path, cwd: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child process, ended with the block."""
    with log.open("ab") as output:
        child = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, cwd=cwd)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_answer(port: int, route: str) -> None:
    """Until a request through ``port`` is answered."""
    ask = {"model": MODEL, "max_tokens": 1, "stream": False}
    body = json.dumps(ask | {"messages": [{"role": "user", "content": "hello"}]}).encode()
    headers = {"Content-Type": "application/json", "x-popmesh-route": route}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def run(
    rounds: int, seconds: float, work: Path, before: Path | None
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Raw samples by load and side."""
    topology = work / "mesh.yaml"
    topology.write_text(TOPOLOGY)
    directory, router, backend, proxy = free_ports(4)
    registry = f"consul://127.0.0.1:{directory}"
    around = str(Path(__file__).resolve().parent / "parts" / "router_stand_ins.py")
    log = work / "log"
    mesh = ["-m", "popmesh", "router", "--topology", str(topology), "--registry", registry]
    listen = ["--listen", f"127.0.0.1:{router}"]
    samples: dict[str, dict[str, list[dict[str, float]]]] = {}
    with contextlib.ExitStack() as stack:
        own = stack.enter_context
        own(started("-m", "popmesh", "registry", "--listen", f"127.0.0.1:{directory}", log=log))
        time.sleep(2)
        own(started(around, "nodes", registry, log=log))
        own(started(around, "backend", str(backend), log=log))
        ours = own(started(*mesh, "--name", "r", *listen, log=log))
        sides = {"popmesh": (router, ours.pid)}
        if before is not None:  # ``-m`` looks into the working directory first
            (port,) = free_ports(1)
            listen = ["--name", "before", "--listen", f"127.0.0.1:{port}"]
            sides["before"] = port, own(started(*mesh, *listen, log=log, cwd=before)).pid
        target = f"http://127.0.0.1:{backend}"
        peer = own(started(around, "proxy", str(proxy), target, log=log))
        for port, _ in sides.values():
            wait_answer(port, "prefill=n1,decode=n2")
        wait_answer(proxy, "")
        sides["aiohttp-proxy"] = proxy, peer.pid
        for number in range(rounds):
            for name, load in LOADS.items():
                for side, (port, pid) in sorted(sides.items(), reverse=bool(number % 2)):
                    if name == "stream_split" and side == "aiohttp-proxy":
                        continue
                    found = uvloop.run(measure(port, pid, load, seconds))
                    samples.setdefault(name, {}).setdefault(side, []).append(found)
                    shown = {key: round(value, 1) for key, value in found.items()}
                    print(name, side, shown, flush=True)
    return samples


def summary(samples: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians over rounds, and peer / popmesh where there is a peer."""
    out: dict[str, Any] = {}
    for name, sides in samples.items():
        key = "cpu_us_per_event" if LOADS[name]["stream"] else "cpu_us_per_request"
        medians = {side: statistics.median(s[key] for s in got) for side, got in sides.items()}
        out[name] = {key: {side: round(value, 1) for side, value in medians.items()}}
        for side, word in (("aiohttp-proxy", "peer"), ("before", "before")):
            if side in medians:
                out[name][f"{word}_over_popmesh"] = round(medians[side] / medians["popmesh"], 2)
    return out


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--before", type=Path, help="another checkout, whose router runs too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="popmesh-bench-") as work:
        samples = run(args.rounds, args.seconds, Path(work), args.before)
    report = facts(__doc__, ("aiohttp", "uvloop", "msgspec")) | {
        "before": commit(args.before) if args.before is not None else None,
        "warm_up_s": WARM_S,
        "loads": LOADS,
        "summary": summary(samples),
        "samples": samples,
    }
    save(report, args.out)
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
