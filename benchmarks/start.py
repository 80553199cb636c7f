"""From the start of a process to its first token: this project's engine and mesh, and its peers.

    python benchmarks/start.py --store .cache/store-2 --out benchmarks/results/start.json
        [--rounds 3] [--add] [--huggingface DIR --transformers VENV --vllm VENV]
        [--llama LLAMA_SERVER --gguf BF16.gguf]

SmolLM2-135M in bfloat16, all cores, one contestant at a time, taking turns. ``engine``: one engine
process as a node starts it, from its making to the first token of a 5-token prompt on its socket.
``popmesh``: ``popmesh up``, that is registry, router and node, to the first token over HTTP. The
peers are servers, to the first token over HTTP as well, asked every 20 ms. ``running``: an engine
process that was started ahead as a running node does, its kernels loaded and its memory touched,
from its set-up on (the model's files are cold); ``within`` is the time to the first token of its
warm-up less one forward pass of a prompt of that length, over the time that the drive needs for the
model's bytes: the best of direct reads by 1, 4 and 16 threads just before. It is taken
``RUNNING_SAMPLES`` times after each round, and contains neither the agent's part nor the room that
another model may have to make.

Conditions: *warm*, page cache as the turn before left it (the first turn of each contestant is not
counted); *model*, the model's files were dropped and mincore(2) says that no page is left; *all*,
the kernel was told to drop all caches, so Python's and torch's files too, of which what other
processes use stays: ``library_pages_resident`` is the share of torch's libraries that did. vLLM is
slow to start and runs in the first round only. Who is not installed is named in ``skipped``. A
round takes minutes: ``--add`` adds rounds to those that ``--out`` has from the same commit.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from common.cold_pages import CEILINGS, drop_pages, read_direct, resident_share
from common.ports import free_ports
from common.report import command_line, commit, facts, save
from engine import Engine, drop_page_cache, engines, serving

from pop_node.engine import messages as m
from pop_node.engine.boundary import MessageReader, encode, send_setup
from pop_node.engine.config import Ahead, EngineConfig
from pop_node.kv_stream.staging import Staging, StagingLayout
from pop_node.store.store import Store

MODEL = "smollm2-135m"
CONDITIONS = ("warm", "model", "all")
PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
KV_TOKENS = 16384
TIMEOUT_S = 180.0
SLOW = {"vllm"}
RUNNING_SAMPLES = 5
SETTLED_S = 0.3
"""An engine process started ahead that uses no processor for so long has imported everything."""


# ---- one engine process ------------------------------------------------------------------------


class EngineProcess:
    """Started like a node starts it; ``say`` and ``hear`` are its socket."""

    def __init__(self, ahead: Ahead | None = None) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(TIMEOUT_S)
        self.began = time.monotonic()
        command = [sys.executable, "-m", "pop_node.engine", str(theirs.fileno())]
        command += [ahead.to_argument()] if ahead is not None else []
        with theirs:
            self.process = psutil.Popen(command, pass_fds=(theirs.fileno(),))
        self._reader = MessageReader()

    def set_up(self, bundle: Path) -> None:
        staging = Staging.create(StagingLayout())
        config = EngineConfig(bundle, "bfloat16", "auto", os.cpu_count() or 1, KV_TOKENS)
        send_setup(self.sock, config, staging.layout, staging.fd)
        staging.close()

    def hear(self, wanted: Callable[[Any], bool]) -> Any:
        while True:
            data = self.sock.recv(1 << 16)
            if not data:
                raise RuntimeError("the engine is gone")
            for message in self._reader.feed(data):
                if isinstance(message, m.Crashed):
                    raise RuntimeError(message.message)
                if wanted(message):
                    return message

    def answer(self, seq: int, prompt: list[int]) -> float:
        """Seconds to the first token."""
        began = time.monotonic()
        add = m.Add(seq, "both", prompt, [], 1, 0.0, 1.0, 0, [], b"%d" % seq, b"")
        self.sock.sendall(encode(add))
        self.hear(lambda message: isinstance(message, m.StepDone) and bool(message.tokens))
        return time.monotonic() - began

    def wait_imported(self) -> None:
        spent, since = -1.0, time.monotonic()
        while time.monotonic() - since < SETTLED_S or spent < 0.5:
            times = self.process.cpu_times()
            if times.user + times.system != spent:
                spent, since = times.user + times.system, time.monotonic()
            time.sleep(0.02)


@contextmanager
def engine_process(ahead: Ahead | None = None) -> Iterator[EngineProcess]:
    engine = EngineProcess(ahead)
    try:
        yield engine
    finally:
        engine.sock.close()
        engine.process.wait(10)


def start_engine(bundle: Path) -> dict[str, Any]:
    with engine_process() as engine:
        engine.set_up(bundle)
        ready = engine.hear(lambda message: isinstance(message, m.Ready))
        ready_s = time.monotonic() - engine.began
        engine.answer(1, PROMPT)
        seconds = time.monotonic() - engine.began
        spent = engine.process.cpu_times()
    return {
        "seconds": seconds,
        "ready_s": ready_s,
        "cpu_s": spent.user + spent.system,
        "phases": [list(phase) for phase in ready.phases],
    }


def start_running(bundle: Path) -> dict[str, Any]:
    weights = bundle / "weights.bin"
    nbytes = weights.stat().st_size
    ahead = Ahead("auto", os.cpu_count() or 1, False, nbytes, nbytes)
    with engine_process(ahead) as engine:
        engine.wait_imported()
        rates = {}
        for name, threads in CEILINGS.items():
            run = read_direct(weights, threads)
            began = time.monotonic()
            run()
            rates[name] = nbytes / (time.monotonic() - began) / 1e9
        resident = drop_pages([file for file in bundle.iterdir() if file.is_file()])
        engine.set_up(bundle)
        ready = engine.hear(lambda message: isinstance(message, m.Ready))
        spans = {name: (began, ended) for name, began, ended, _ in ready.phases}
        answers = [engine.answer(seq, [seq] * (ready.block_tokens + 1)) for seq in range(1, 7)]
        forward_s = statistics.median(answers[1:])  # by then nothing is used for the first time
    seconds = spans["first_token"][1] - spans["standby"][1]
    drive_s = nbytes / max(rates.values()) / 1e9
    return {
        "seconds": seconds,
        "model_pages_resident": resident,
        "drive_gbytes_per_s": rates,
        "drive_s": drive_s,
        "forward_s": forward_s,
        "within": (seconds - forward_s) / drive_s,
        "phases": [list(phase) for phase in ready.phases],
    }


# ---- turns -------------------------------------------------------------------------------------


def torch_libraries(python: Path) -> list[Path]:
    """The large files of torch in the environment of a contestant."""
    return [
        path.resolve()
        for path in python.parent.parent.glob("lib/*/site-packages/torch/lib/libtorch*.so")
    ]


def turn(
    condition: str, start: Callable[[], dict[str, Any]], files: list[Path], libraries: list[Path]
) -> dict[str, Any]:
    """One start under one condition; raises ``RuntimeError`` if pages of the model are left."""
    found: dict[str, Any] = {"condition": condition}
    if condition == "all":
        found["dropped"] = drop_page_cache()
    if condition != "warm":
        found["model_pages_resident"] = drop_pages(files)
        if found["model_pages_resident"]:
            raise RuntimeError(f"{found['model_pages_resident']} pages of the model are left")
        found["library_pages_resident"] = resident_share(libraries) if libraries else None
    return found | start()


def serve(engine: Engine, url: str, log: Path) -> dict[str, Any]:
    with serving(engine, url, log) as (_, seconds):
        return {"seconds": seconds}


def summary(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians in seconds by condition; the parts of the engine's; ``running`` apart."""
    found: dict[str, Any] = {"start_s": {}}
    for name, turns in samples.items():
        if name != "running":
            found["start_s"][name] = {
                condition: statistics.median(
                    each["seconds"] for each in turns if each["condition"] == condition
                )
                for condition in CONDITIONS
                if any(each["condition"] == condition for each in turns)
            }
    found["engine_cpu_s"] = statistics.median(each["cpu_s"] for each in samples["engine"])
    quickest = min(
        (each for each in samples["engine"] if each["condition"] == "warm"),
        key=lambda each: float(each["seconds"]),
    )
    found["engine_phases_of_the_quickest"] = quickest["phases"]
    for key in ("seconds", "drive_s", "forward_s", "within"):
        found[f"running_{key}"] = statistics.median(each[key] for each in samples["running"])
    return found


def earlier_samples(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Those of an earlier run. Exits if they are from another commit."""
    report: dict[str, Any] = json.loads(out.read_text())
    if report["commit"] != commit():
        sys.exit(f"{out} is from commit {report['commit']}")
    samples: dict[str, list[dict[str, Any]]] = report["samples"]
    return samples


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True, help=f"store that holds {MODEL}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="to the samples of an earlier run")
    parser.add_argument("--huggingface", type=Path, help="the model for transformers and vLLM")
    parser.add_argument("--transformers", help="venv with transformers[serving]")
    parser.add_argument("--vllm", help="venv with vllm")
    parser.add_argument("--llama", help="llama-server binary")
    parser.add_argument("--gguf", type=Path, help="bf16 GGUF made by gguf_bf16.py")
    args = parser.parse_args()
    args.only = None
    samples = earlier_samples(args.out) if args.add else {}
    first = len(samples.get("running", [])) // RUNNING_SAMPLES

    bundle = Store(args.store).get(MODEL).path
    work = Path(tempfile.mkdtemp(prefix="popmesh-start-"))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    skipped = {
        name: "not given or not there"
        for name, needs in {
            "transformers": (args.huggingface, args.transformers),
            "vllm": (args.huggingface, args.vllm),
            "llama.cpp": (args.gguf, args.llama),
        }.items()
        if not all(need and Path(need).exists() for need in needs)
    }
    for name, attribute in (("transformers",) * 2, ("vllm",) * 2, ("llama.cpp", "llama")):
        if name in skipped:
            setattr(args, attribute, None)
    peers_model = args.huggingface or bundle
    servers = {each.name: each for each in engines(args, peers_model, work, port)}
    contestants: dict[str, tuple[Callable[[], dict[str, Any]], Path, list[Path]]] = {
        "engine": (lambda: start_engine(bundle), bundle, torch_libraries(Path(sys.executable)))
    }
    for name, server in servers.items():
        model = bundle if name == "popmesh" else args.gguf if name == "llama.cpp" else peers_model
        libraries = [] if name == "llama.cpp" else torch_libraries(Path(server.command[0]))
        contestants[name] = (
            lambda server=server: serve(server, url, work / f"{server.name}.log"),  # type: ignore[misc]
            model,
            libraries,
        )
    for name in [*contestants, "running"]:
        samples.setdefault(name, [])
    for number in range(first, first + args.rounds):
        names = [name for name in contestants if number == 0 or name not in SLOW]
        for condition in CONDITIONS:
            for name in names[number % len(names) :] + names[: number % len(names)]:
                start, model, libraries = contestants[name]
                files = [f for f in (model.iterdir() if model.is_dir() else [model]) if f.is_file()]
                try:
                    if number == first and condition == "warm":
                        start()  # fills the page cache
                    found = turn(condition, start, files, libraries)
                except (OSError, RuntimeError, subprocess.TimeoutExpired) as exc:
                    if name in ("engine", "popmesh"):
                        raise
                    contestants.pop(name)
                    samples.pop(name)
                    names.remove(name)
                    skipped[name] = str(exc)
                    continue
                samples[name].append(found)
                print(f"{number} {condition:6} {name:13} {found['seconds']:.2f} s", flush=True)
        for _ in range(RUNNING_SAMPLES):
            samples["running"].append(start_running(bundle))
            print(f"{number} within {samples['running'][-1]['within']:.2f} of the drive's time")
    report = facts(__doc__, ("torch", "numpy", "blake3")) | {
        "load_average": os.getloadavg(),
        "model_bytes": (bundle / "weights.bin").stat().st_size,
        "skipped": skipped,
        "summary": summary(samples),
        "samples": samples,
    }
    save(report, args.out)
    print(json.dumps(report["summary"], indent=1))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
