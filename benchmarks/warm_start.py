"""Loading weights from a cold disk: this project's loader, three others, and what the drive can do.

    python benchmarks/warm_start.py --out benchmarks/results/warm_start.json --work DIR
        [--gib 4] [--rounds 3] [--peers SITE]

The model is synthetic: Llama-3.1-8B's shapes in bfloat16 with as many layers as make ``--gib``,
once as one safetensors file and once as a bundle, both in ``--work`` (kept, so a second run starts
at once). Every figure comes from a fresh process that has imported everything it needs; before it
the page cache of all model files is dropped and mincore(2) confirms that no page is resident, so
"cold" means the model's files only, not Python and torch. In each round every contestant runs once,
in turning order.

Memory: a virtual machine may have to ask its host for memory that nobody used lately, which costs
more than the disk (1.3 to 2.1 s/GB of processor time where this was written, against 0.04 s/GB for
memory used before). So each process touches ``TOUCHED`` times the memory that the model needs and
frees it, until that costs no more than ``TOUCHED_S_PER_GBYTE`` (at most ``TOUCHES`` times; each
sample says what it came to), just before it measures, for all loaders alike; ``ours-untouched`` is
ours without that. ``into-memory`` is no ceiling but what the drive gives when 16 threads read into
fresh memory of the model's size, unverified: what is left of the ceiling when data lands in memory
that is in no cache and is touched for the first time.

What was imported is frozen for the collector of garbage, as in our engines: walking all of torch
takes 0.1 s, whoever happens to cause it.

*Load* ends when every page of every tensor was read once (one byte per 4 KiB, for all alike): some
loaders hand out lazily mapped files. *Ceiling*: the best of direct reads of the bundle's data file
by 1, 4 and 16 threads in that round, each into one 4 MiB buffer that was touched before: no memory
but the drive is measured. fio (libaio, direct) joins where it is installed. Ours verifies every
byte; the others verify none. Peak is VmHWM after a reset, less the resident size before the load.
fastsafetensors and runai-model-streamer come from ``--peers``, a directory filled by ``pip install
--no-deps --target``; without it they are left out.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common.cold_pages import CEILINGS
from common.report import command_line, facts, save
from common.synthetic_model import SEED, prepare, shapes
from parts.warm_start_load import child

LOADERS = ("ours", "ours-untouched", "safetensors", "fastsafetensors", "runai")


def once(kind: str, path: Path, peers: Path | None) -> dict[str, Any]:
    paths = [str(Path(__file__).resolve().parents[1]), *([str(peers)] if peers else [])]
    command = [sys.executable, __file__, "--child", kind, "--path", str(path)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["resident_pages_before"]:
        raise RuntimeError(f"{kind}: {found['resident_pages_before']} pages were not dropped")
    return found


def once_fio(path: Path) -> dict[str, Any]:
    command = ["fio", "--name=r", f"--filename={path}", "--rw=read", "--bs=4M", "--direct=1"]
    command += ["--ioengine=libaio", "--iodepth=32", "--readonly", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    read = json.loads(done.stdout)["jobs"][0]["read"]
    return {"gbytes_per_s": read["bw_bytes"] / 1e9, "seconds": read["runtime"] / 1e3}


def summary(samples: dict[str, list[dict[str, Any]]], model_bytes: int) -> dict[str, Any]:
    """Medians, and ratios formed within each round."""
    ceilings = [name for name in samples if name in CEILINGS or name == "fio"]
    rounds = range(len(samples["ours"]))
    best = [max(samples[name][n]["gbytes_per_s"] for name in ceilings) for n in rounds]

    def median(name: str, key: str) -> float:
        return statistics.median(sample[key] for sample in samples[name])

    ours = [sample["gbytes_per_s"] for sample in samples["ours"]]
    loaders = [name for name in LOADERS if name in samples]
    return {
        "model_bytes": model_bytes,
        "ceiling_gbytes_per_s": statistics.median(best),
        "ours_over_ceiling": statistics.median(a / b for a, b in zip(ours, best, strict=True)),
        "ours_over_ceiling_by_round": [a / b for a, b in zip(ours, best, strict=True)],
        "ours_over_into_memory": statistics.median(
            a / b["gbytes_per_s"] for a, b in zip(ours, samples["into-memory"], strict=True)
        ),
        "ours_over": {
            name: statistics.median(
                a / b["gbytes_per_s"] for a, b in zip(ours, samples[name], strict=True)
            )
            for name in loaders[1:]
        },
        "gbytes_per_s": {name: median(name, "gbytes_per_s") for name in samples},
        "cpu_s_per_gbyte": {name: median(name, "cpu_s_per_gbyte") for name in loaders},
        "peak_over_model_mib": {
            name: max(sample["peak_over_model_mib"] for sample in samples[name]) for name in loaders
        },
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--path", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.path)
        return
    if args.out is None or args.work is None:
        parser.error("--out and --work are needed")
    args.work.mkdir(parents=True, exist_ok=True)
    weights, bundle = prepare(args.work, args.gib)
    model_bytes = sum(math.prod(shape) * 2 for shape in shapes(args.gib).values())
    where = {name: bundle if name.startswith("ours") else weights for name in LOADERS}
    where |= dict.fromkeys([*CEILINGS, "into-memory"], bundle / "weights.bin")
    if args.peers is None:
        del where["fastsafetensors"], where["runai"]
    names = [*where, *(["fio"] if shutil.which("fio") else [])]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(args.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name == "fio":
                found = once_fio(bundle / "weights.bin")
            else:
                found = once(name, where[name], args.peers)
            samples[name].append(found)
            print(f"{name:16} {found['gbytes_per_s']:.2f} GB/s", flush=True)
    installed = {d.name: d.version for d in distributions(path=[str(args.peers)])}
    report = facts(__doc__, ("torch", "safetensors", "blake3"))
    report["versions"] |= installed if args.peers else {}
    report |= {
        "kernel": platform.release(),
        "gib": args.gib,
        "seed": SEED,
        "load_average": os.getloadavg(),
        "niceness": os.nice(0),
        "summary": summary(samples, model_bytes),
        "samples": samples,
    }
    save(report, args.out)
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
