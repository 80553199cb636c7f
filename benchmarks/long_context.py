"""Long contexts: what a prompt of 4,096 tokens does to running answers, and memory up to 8,192.

    python benchmarks/long_context.py --store .cache/store-2 \\
        --out benchmarks/results/long_context.json [--streams 4] [--rounds 3]

SmolLM2-135M bf16 on one thread, scheduler and runner without sockets, chunks of 512 tokens.
``stall``: streams decode, then the prompt is admitted. ITL is the time between two tokens of a
stream, and the figure to keep at 2 or below is ITL p99 while the prompt is computed / the longest
chunk of the same prompt computed alone, in the same round (the last chunk of a prompt sees the most
keys). ``memory``: a process per context computes a prompt of it and one token; bytes are the growth
of its peak resident memory since the model was loaded. Linear means that the bytes of a token do
not grow with the context: ``per_token`` is the growth between a context and the one before.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.report import command_line, facts, save

BLOCK_TOKENS, NUM_BLOCKS, BUDGET = 16, 1024, 512
PROMPT, STREAM_PROMPT = 4096, 64
CONTEXTS = (1024, 2048, 4096, 8192)


class Bench:
    """An engine without its process."""

    def __init__(self, directory: Path) -> None:
        from pop_node.engine.running.runner import Runner
        from pop_node.models.registry import load_backend, load_model

        ops = load_backend("native", 1)
        self.operations = ops.name
        self._vocab = 40_000
        self._runner = Runner(load_model(directory, "bfloat16", ops), ops, NUM_BLOCKS, BLOCK_TOKENS)
        self._rng = random.Random(7)
        self.restart()

    def restart(self) -> None:
        """Forget everything but the model."""
        from pop_node.engine.scheduling.block_pool import BlockPool
        from pop_node.engine.scheduling.scheduler import Scheduler
        from pop_node.engine.scheduling.validate import Limits

        limits = Limits(self._vocab, NUM_BLOCKS * BLOCK_TOKENS, BLOCK_TOKENS, NUM_BLOCKS)
        pool = BlockPool(NUM_BLOCKS, BLOCK_TOKENS)
        self.scheduler = Scheduler(
            pool, limits, token_budget=BUDGET, max_sequences=64, max_waiting=64
        )

    def add(self, seq: int, prompt: int, answer: int) -> None:
        """Queue random tokens."""
        from pop_node.engine.messages import Add

        ids = [self._rng.randrange(1000, self._vocab) for _ in range(prompt)]
        add = Add(seq, "both", ids, [], answer, 0.0, 1.0, 0, [], b"%d" % seq, b"")
        self.scheduler.handle(add, 0.0)

    def step(self) -> tuple[float, int, set[int]]:
        """(seconds, prompt tokens computed, sequences that got a token)."""
        from pop_node.engine.messages import Token

        began = time.perf_counter()
        schedule, _ = self.scheduler.schedule(0.0)
        ids = self._runner.run(schedule, None)
        effects = self.scheduler.complete(schedule, ids, 0.0)
        took = time.perf_counter() - began
        return took, schedule.prefill_tokens, {e.seq for e in effects if isinstance(e, Token)}


def chunks_alone(bench: Bench) -> list[float]:
    """Seconds of each chunk of the prompt when nobody else is there."""
    bench.restart()
    bench.add(1, PROMPT, 1)
    took = []
    while bench.scheduler.num_sequences:
        took.append(bench.step()[0])
    return took


def gaps_beside(bench: Bench, streams: int) -> tuple[list[float], list[float]]:
    """(gaps before the prompt came, gaps while it was computed) of all streams, in seconds."""
    bench.restart()
    for seq in range(streams):
        bench.add(100 + seq, STREAM_PROMPT, 1000)
    while bench.step()[1]:
        pass
    before = [gap for _ in range(16) for gap in [bench.step()[0]] * streams]
    bench.add(1, PROMPT, 1)
    during: list[float] = []
    told: set[int] = set()
    while 1 not in told:
        took, _, told = bench.step()
        if len(told - {1}) != streams:
            raise SystemExit("a stream got no token in a step")
        during += [took] * streams
    return before, during


def stall(bench: Bench, streams: int, rounds: int) -> dict[str, Any]:
    """Raw samples of all rounds, and medians."""
    samples = []
    for _ in range(rounds):
        alone = chunks_alone(bench)
        before, during = gaps_beside(bench, streams)
        p99 = statistics.quantiles(during, n=100, method="inclusive")[98]
        samples.append(
            {
                "chunks_alone_s": alone,
                "itl_p50_before_s": statistics.median(before),
                "itl_p99_during_s": p99,
                "itl_p99_over_longest_chunk": p99 / max(alone),
                "itl_during_s": during[::streams],
            }
        )
    ratios = [sample["itl_p99_over_longest_chunk"] for sample in samples]
    return {"ratio": round(statistics.median(ratios), 3), "streams": streams, "samples": samples}


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def memory_worker(directory: Path, context: int) -> None:
    """Print by how much the peak grew for a prompt that fills ``context``."""
    bench = Bench(directory)
    bench.add(1, BUDGET, 2)  # what the first steps load and allocate is not the context's
    while bench.scheduler.num_sequences:
        bench.step()
    before = peak_bytes()
    bench.restart()
    bench.add(1, context - 1, 1)
    while bench.scheduler.num_sequences:
        bench.step()
    print(json.dumps(peak_bytes() - before))


def memory(directory: Path) -> dict[str, Any]:
    """Growth per context."""
    grown = {}
    for context in CONTEXTS:
        command = [sys.executable, __file__, "--worker", str(directory), str(context)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown[context] = int(done.stdout)
    pairs = pairwise(CONTEXTS)
    per_token = {high: (grown[high] - grown[low]) / (high - low) for low, high in pairs}
    return {"bytes": grown, "per_token": per_token}


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="store that holds the model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    from pop_node.store.store import Store

    directory = Store(args.store).get("smollm2-135m").path.resolve()
    bench = Bench(directory)
    report = facts(__doc__, ("torch",)) | {"operations": bench.operations, "chunk_tokens": BUDGET}
    report["stall"] = stall(bench, args.streams, args.rounds)
    print("stall", report["stall"]["ratio"], flush=True)
    report["memory"] = memory(directory)
    print("memory", json.dumps(report["memory"]), flush=True)
    save(report, args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        memory_worker(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
