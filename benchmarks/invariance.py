"""What the batch-invariant mode costs: CPU time of decode and prefill with and without it.

    python benchmarks/invariance.py --store .cache/store-2 \\
        --out benchmarks/results/invariance.json [--before CHECKOUT] [--rounds 5]

SmolLM2-135M on one thread, scheduler and runner without sockets. Each variant is a process of its
own; within a round they take turns at every measurement, so that a slow minute of a shared machine
hits all of them. ``--before`` is a checkout of an earlier commit, whose native kernels (one order
of summation for small batches, another for large ones) are measured as ``before``.

``decode B``: steps of B running sequences, 64-token prompts; CPU seconds per token, and tok/s =
1 / that. ``prefill N``: a prompt of N tokens in chunks of 512, its first token included. The
reference, at a tenth of a second per token, is measured twice and at small sizes only. Ratios are
medians over rounds of CPU time / CPU time of the variant they name, in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.report import ROOT, command_line, commit, facts, save

BATCHES = (1, 4, 16)
PROMPTS = (32, 512, 2048)
DECODE_PROMPT = {"native": 64, "reference": 8}
REFERENCE_ROUNDS = 2
WARM_STEPS = 2
PREFILL_STEPS = 40
"""Far more than the prompts of the largest batch need: nobody ends before all decode."""


@dataclass(frozen=True)
class Variant:
    """A backend to measure. ``compared_with`` names the one its cost is relative to."""

    name: str
    backend: str
    batch_invariant: bool
    compared_with: str | None
    checkout: Path = ROOT


def variants(before: Path | None) -> list[Variant]:
    """All of a dtype, each after the one it is compared with."""
    found = [
        Variant("reference", "reference", False, None),
        Variant("reference+batch_invariant", "reference", True, "reference"),
        Variant("native", "native", False, None),
        Variant("native+batch_invariant", "native", True, "native"),
    ]
    if before is not None:
        old = Variant("before", "native", False, None, before)
        found[2:] = [old, Variant("native", "native", False, "before"), found[3]]
    return found


def measurements(variant: Variant) -> list[tuple[str, int, int]]:
    """(phase, size, steps or repetitions); the reference is spared what would take minutes."""
    if variant.backend == "reference":
        return [*(("decode", b, 2) for b in BATCHES[:2]), ("prefill", PROMPTS[0], 1)]
    return [*(("decode", b, 16) for b in BATCHES), *(("prefill", n, 1) for n in PROMPTS)]


# ---- one variant, in a process of its own -------------------------------------------------------


def worker(directory: Path, dtype: str, backend: str, batch_invariant: bool, seed: int) -> None:
    """Answer each ``[phase, size, repetitions]`` on stdin with both times per token."""
    from pop_node.engine.messages import Add
    from pop_node.engine.running.runner import Runner
    from pop_node.engine.scheduling.block_pool import BlockPool
    from pop_node.engine.scheduling.scheduler import Scheduler
    from pop_node.engine.scheduling.validate import Limits
    from pop_node.models.registry import load_backend, load_model

    # An earlier checkout does not know the option.
    asked: dict[str, Any] = {"batch_invariant": True} if batch_invariant else {}
    ops = load_backend(backend, 1, **asked)  # type: ignore[arg-type]
    model = load_model(directory, dtype, ops)
    blocks, block_tokens = 512, 16
    runner = Runner(model, ops, blocks, block_tokens)
    limits = Limits(model.config.vocab_size, blocks * block_tokens, block_tokens, blocks)
    rng = random.Random(seed)
    minted = 0

    def scheduler() -> Scheduler:
        pool = BlockPool(blocks, block_tokens)
        return Scheduler(pool, limits, token_budget=512, max_sequences=64, max_waiting=64)

    def add(to: Scheduler, tokens: int, answer: int) -> None:
        nonlocal minted
        minted += 1
        prompt = [rng.randrange(1000, 40000) for _ in range(tokens)]
        to.handle(Add(minted, "both", prompt, [], answer, 0.0, 1.0, 0, [], b"", b""), 0.0)

    def step(of: Scheduler) -> int:
        schedule, _ = of.schedule(0.0)
        ids = runner.run(schedule, lambda layer: None)
        of.complete(schedule, ids, 0.0)
        return schedule.num_tokens

    def decode(batch: int, steps: int) -> int:
        for _ in range(steps):
            assert step(running) == batch
        return batch * steps

    print(json.dumps(ops.name), flush=True)
    for line in sys.stdin:
        phase, size, count = json.loads(line)
        running = scheduler()
        if phase == "decode":
            for _ in range(size):
                add(running, DECODE_PROMPT[backend], WARM_STEPS + count + PREFILL_STEPS)
            step(running)
            while running.load().waiting or running.load().queued_prefill_tokens:
                step(running)
            decode(size, WARM_STEPS)
            cpu, wall = time.process_time(), time.perf_counter()
            tokens = decode(size, count)
        else:
            add(running, size, 1)
            cpu, wall = time.process_time(), time.perf_counter()
            tokens = 0
            while running.num_sequences:
                tokens += step(running)
        spent = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"cpu_s": spent[0] / tokens, "wall_s": spent[1] / tokens}), flush=True)


class Worker:
    """A running variant."""

    def __init__(self, variant: Variant, directory: Path, dtype: str, seed: int) -> None:
        self.variant = variant
        arguments = [str(directory), dtype, variant.backend, str(int(variant.batch_invariant))]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *arguments, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=variant.checkout,
            env={**os.environ, "PYTHONPATH": str(variant.checkout), "OMP_NUM_THREADS": "1"},
        )
        self.ops = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.variant.name} ended")
        return json.loads(line)

    def measure(self, phase: str, size: int, count: int) -> dict[str, float]:
        """One measurement."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([phase, size, count]) + "\n")
        self._process.stdin.flush()
        answer: dict[str, float] = self._answer()
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


# ---- all of them --------------------------------------------------------------------------------


def compare(directory: Path, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Raw samples and summary of one dtype."""
    workers = [Worker(v, directory, dtype, args.seed) for v in variants(args.before)]
    samples: dict[str, dict[str, list[dict[str, float]]]] = {w.variant.name: {} for w in workers}
    try:
        for each in workers:
            each.measure(*measurements(each.variant)[0])  # warm-up
        for round_ in range(args.rounds):
            keys = [("decode", b) for b in BATCHES] + [("prefill", n) for n in PROMPTS]
            for phase, size in keys:
                for each in workers:
                    if each.variant.backend == "reference" and round_ >= REFERENCE_ROUNDS:
                        continue
                    for found, n, count in measurements(each.variant):
                        if (found, n) == (phase, size):
                            of = samples[each.variant.name].setdefault(f"{phase} {size}", [])
                            of.append(each.measure(phase, size, count))
            print(dtype, "round", round_, flush=True)
    finally:
        for each in workers:
            each.close()
    return {
        "operations": {w.variant.name: w.ops for w in workers},
        "summary": {w.variant.name: summary(w.variant, samples) for w in workers},
        "samples": samples,
    }


def summary(
    variant: Variant, samples: dict[str, dict[str, list[dict[str, float]]]]
) -> dict[str, dict[str, float]]:
    """Medians of a variant, and of its ratios within a round."""
    rows: dict[str, dict[str, float]] = {}
    for key, taken in samples[variant.name].items():
        cpu = [each["cpu_s"] for each in taken]
        median = statistics.median(cpu)
        rows[key] = {"cpu_ms_per_token": round(1e3 * median, 3), "tok_s": round(1 / median, 1)}
        if variant.compared_with is not None:
            base = [each["cpu_s"] for each in samples[variant.compared_with][key]]
            ratio = statistics.median(a / b for a, b in zip(cpu, base, strict=True))
            rows[key][f"cpu_over_{variant.compared_with}"] = round(ratio, 3)
    return rows


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="store that holds the models")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from pop_node.store.store import Store

    store = Store(args.store)
    report = facts(__doc__, ("torch",)) | {
        "before": commit(args.before) if args.before else None,
        "threads": 1,
        "seed": args.seed,
        "rounds": args.rounds,
        "load_average": os.getloadavg(),
    }
    models = {"bfloat16": "smollm2-135m", "float32": "smollm2-135m-f32"}
    for dtype, model in models.items():
        report[dtype] = compare(store.get(model).path.resolve(), dtype, args)
        for name, rows in report[dtype]["summary"].items():
            print(dtype, name, json.dumps(rows), flush=True)
        save(report, args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        path, dtype_, backend_, invariant_, seed_ = sys.argv[2:]
        worker(Path(path), dtype_, backend_, invariant_ == "1", int(seed_))
    else:
        main()
