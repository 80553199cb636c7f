"""Meshes of one node, its weights resident or plain: tokens/s through HTTP, and the same text.

    python benchmarks/resident_mesh.py --store .cache/store-2 \\
        --out benchmarks/results/resident_mesh.json [--rounds 3]

``popmesh up`` on all cores, one form at a time, the two alternating. ``start_s`` and the loads are
those of ``benchmarks/engine.py``: pure decode of one stream at temperature 1, and output tokens/s
at 1, 4 and 16 clients (200-token prompts, 64 tokens of answer). Ratios are medians over rounds of
resident / plain. A greedy answer must be the same text, or nothing is reported.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.ports import free_ports
from common.report import command_line, facts, save
from engine import CLIENTS, KV_TOKENS, TOPOLOGY, Engine, cpu_s, rss_mb, serving
from load import Load, run

FORMS = ("plain", "resident")
MODEL = "smollm2-135m"
PROMPT = "The harbour was quiet that morning, and the fishermen said that"


def greedy(url: str) -> str:
    """A greedy answer of 96 tokens."""
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 96,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def turn(form: str, args: Any, work: Path, tokenizer: Path, seed: int) -> dict[str, Any]:
    """One mesh of one form, from its start to its end."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    topology = TOPOLOGY.format(threads=os.cpu_count(), port=port, kv_tokens=KV_TOKENS)
    path = work / f"{form}.yaml"
    path.write_text(topology.replace("kv_tokens:", f"weights: {form}, kv_tokens:"))
    command = [sys.executable, "-m", "popmesh", "up", str(path), "--store", str(args.store)]
    extra = {"ignore_eos": True}
    engine = Engine(form, command, MODEL, extra=extra)
    base = Load(url, MODEL, str(tokenizer), extra=extra)
    with serving(engine, url, work / f"{form}.log") as (process, start_s):
        found: dict[str, Any] = {"start_s": round(start_s, 3), "text": greedy(url)}
        drawn = {**extra, "temperature": 1.0}
        one = replace(base, prompt_tokens=16, output_tokens=128, requests=3, seed=seed, extra=drawn)
        found["decode_drawn_tok_s"] = round(1e3 / asyncio.run(run(one))["tpot_ms"]["p50"], 1)
        for clients in CLIENTS:
            before = cpu_s(process)
            load = replace(
                base,
                concurrency=clients,
                requests=max(3, 2 * clients),
                prompt_tokens=200,
                output_tokens=64,
                seed=seed + clients,
            )
            figures = asyncio.run(run(load))
            spent = cpu_s(process) - before
            found[f"tok_s_{clients}"] = figures["output_tok_s"]
            found[f"cpu_ms_per_token_{clients}"] = round(1e3 * spent / figures["output_tokens"], 2)
        found["pss_mb"] = rss_mb(process)
    return found


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from pop_node.store.store import Store

    tokenizer = Store(args.store).get(MODEL).path / "tokenizer.json"
    work = Path(tempfile.mkdtemp(prefix="popmesh-bench-"))
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(args.rounds):
        order = FORMS if number % 2 else FORMS[::-1]
        turns = {form: turn(form, args, work, tokenizer, 100 * number) for form in order}
        if turns["plain"]["text"] != turns["resident"]["text"]:
            raise RuntimeError("the two forms do not say the same")
        rounds.append(turns)
    keys = [key for key in rounds[0]["plain"] if key != "text"]
    summary = {
        form: {key: statistics.median(one[form][key] for one in rounds) for key in keys}
        for form in FORMS
    }
    ratio = {
        key: round(statistics.median(one["resident"][key] / one["plain"][key] for one in rounds), 3)
        for key in keys
    }
    report = facts(__doc__, ["torch"])
    report |= {"summary": summary, "resident_by_plain": ratio, "rounds": rounds}
    save(report, args.out)
    for key in keys:
        print(f"{key:22}", *(summary[form][key] for form in FORMS), ratio[key])


if __name__ == "__main__":
    main()
