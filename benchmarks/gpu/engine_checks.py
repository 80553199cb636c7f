"""The engine on a GPU is right: logits against two oracles, graphs and batches bit by bit.

    python benchmarks/gpu/engine_checks.py --out build/gpu/engine_checks.json

float32: the logits of prompts in chunks, then of each decoded token, against the reference
operations and against transformers on the same device. bfloat16: their error against the float32
oracle is at most twice that of transformers in bfloat16. Graphs: the logits of every token have the
same bits as when the same padded work is launched again. Batch-invariant mode: the same bits in
other chunks, and alone as beside others. Any difference ends it with 1.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bench_engine as bench
import torch

from pop_node.engine.running.batch import build_batch
from pop_node.engine.scheduling.schedule import Row, Schedule

FLOAT32_ERROR = 1e-4
"""Relative, of a vector of logits: sums in another order, without tensor cores. float32 rounds to
6e-8; a difference of kind (a wrong mask or position) is far above."""

BFLOAT16_RATIO = 2.0
"""Ours to transformers': both round as often, at other places."""

Logits = dict[tuple[int, int], torch.Tensor]
"""By number of the sequence and index of the token."""

Forward = Callable[[list[int]], torch.Tensor]
"""From ids to the logits of all positions: [T, vocab]."""


class Checks:
    """Runs one model's prompts in engines that differ; collects what was found."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu") if dry else torch.device("cuda")
        self.shape = bench.TINY if dry else bench.SMOLLM2
        lengths = (5, 37) if dry else (5, 300, 37, 1)
        drawn = bench.prompts(self.shape, len(lengths), max(lengths))
        self.prompts = [ids[:length] for ids, length in zip(drawn, lengths, strict=True)]
        self.more = 3 if dry else 24
        self.rows: list[dict[str, Any]] = []

    def say(self, name: str, value: float, limit: float) -> None:
        """Note and print one figure, which must not be above ``limit``."""
        right = value <= limit
        self.rows.append({"check": name, "value": value, "limit": limit, "right": right})
        print(f"{'right' if right else 'WRONG'}: {name}: {value:.3g}, limit {limit:.3g}")

    def run(
        self,
        dtype: str,
        *,
        only: int | None = None,
        graphs: bool = True,
        batch_invariant: bool = False,
        budget: int = 64,
        temperature: float = 0.0,
    ) -> Logits:
        """The logits of every token of every prompt, or of prompt number ``only``."""
        ops = bench.operations(self.dry, batch_invariant=batch_invariant)
        device = bench.a_device(self.dry)
        sampler = bench.RecordingSampler()
        numbers = [only] if only else list(range(1, len(self.prompts) + 1))
        chosen = [self.prompts[number - 1] for number in numbers]
        engine = bench.Engine(
            bench.a_model(self.shape, dtype, ops),
            device if graphs else bench.WithoutGraphs(device),
            sum(len(prompt) + self.more + bench.BLOCK_TOKENS for prompt in chosen),
            seats=len(chosen),
            budget=budget,
            sampler=sampler,
        )
        while engine.runner.prepare():
            pass
        owner = {
            engine.add(prompt, self.more, temperature=temperature, seed=number): number
            for number, prompt in zip(numbers, chosen, strict=True)
        }
        engine.run()
        return {(owner[seq], index): row for (seq, index), row in sampler.logits.items()}

    def pairs(self, found: Logits, forward: Forward) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(ours, those of ``forward``) per token; it reads the tokens that ours makes greedily."""
        result = []
        for number, prompt in enumerate(self.prompts, 1):
            mine = [found[number, index] for index in range(self.more)]
            ids = [*prompt, *(int(logits.argmax()) for logits in mine[:-1])]
            result += zip(mine, forward(ids)[len(prompt) - 1 :], strict=True)
        return result

    def error(self, found: Logits, forward: Forward) -> float:
        """The largest relative error of a token's logits."""
        return max(bench.relative_error(*pair) for pair in self.pairs(found, forward))

    def reference(self) -> Forward:
        """The model in float32 on the readable operations."""
        model = bench.a_model(self.shape, "float32", bench.oracle(self.device))

        def forward(ids: list[int]) -> torch.Tensor:
            blocks = -(-len(ids) // bench.BLOCK_TOKENS)
            row_of: Any = SimpleNamespace(ids=array("i", ids), blocks=array("i", range(blocks)))
            schedule = Schedule((Row(row_of, 0, len(ids)),), (0,), (), len(ids))
            batch = build_batch(schedule, bench.BLOCK_TOKENS, self.device)
            cache = model.allocate_cache(blocks, bench.BLOCK_TOKENS)
            every = torch.arange(len(ids), device=self.device)
            with torch.inference_mode():
                return model.forward(batch.ids, batch.meta, cache, every)

        return forward

    def transformers(self, dtype: str) -> Forward | None:
        """transformers' model of the same weights; None where it is not installed."""
        model = bench.hugging_face(self.shape, dtype, self.device)
        if model is None:
            return None

        def forward(ids: list[int]) -> torch.Tensor:
            with torch.inference_mode():
                found: torch.Tensor = model(torch.tensor([ids], device=self.device)).logits[0]
            return found.float()

        return forward


def same_bits(a: Logits, b: Logits) -> int:
    """How many tokens' logits differ in a bit or are missing."""
    both = a.keys() & b.keys()
    return len(a.keys() ^ b.keys()) + sum(not torch.equal(a[key], b[key]) for key in both)


def against_oracles(checks: Checks) -> None:
    """Logits in float32 and, on a GPU, in bfloat16, which the interpreter cannot multiply."""
    single = checks.run("float32")
    reference = checks.reference()
    checks.say("float32 against the reference", checks.error(single, reference), FLOAT32_ERROR)
    theirs = checks.transformers("float32")
    if theirs is None:
        print("transformers is not installed: not compared")
    else:
        checks.say("float32 against transformers", checks.error(single, theirs), FLOAT32_ERROR)
    del theirs
    theirs = checks.transformers("bfloat16")
    if checks.dry or theirs is None:
        return
    half = checks.run("bfloat16")
    ours = checks.error(half, reference)
    oracle = [expected for _, expected in checks.pairs(half, reference)]
    peer = [found for _, found in checks.pairs(half, theirs)]
    other = max(bench.relative_error(*pair) for pair in zip(peer, oracle, strict=True))
    checks.say(f"bfloat16: our error {ours:.3g} to theirs", ours / other, BFLOAT16_RATIO)


def bit_by_bit(checks: Checks) -> None:
    """Graphs, chunks and company; the interpreter's products depend on the row, so there only
    graphs."""
    for dtype in ("float32",) if checks.dry else ("float32", "bfloat16"):
        again = checks.run(dtype, temperature=0.8, graphs=False)
        changed = same_bits(checks.run(dtype, temperature=0.8), again)
        checks.say(f"{dtype}: tokens whose bits graphs change", changed, 0)
        if checks.dry:
            continue
        together = checks.run(dtype, batch_invariant=True)
        chunks = checks.run(dtype, batch_invariant=True, budget=17)
        changed = same_bits(together, chunks)
        checks.say(f"{dtype}, invariant: tokens that other chunks change", changed, 0)
        alone: Logits = {}
        for number in range(1, len(checks.prompts) + 1):
            alone |= checks.run(dtype, batch_invariant=True, only=number)
        changed = same_bits(together, alone)
        checks.say(f"{dtype}, invariant: tokens that company changes", changed, 0)


def main() -> int:
    given = bench.arguments(__doc__)
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = Checks(given.dry)
    against_oracles(checks)
    bit_by_bit(checks)
    content = bench.facts(__doc__, given.dry)
    content |= {"model": checks.shape.name, "checks": checks.rows}
    bench.save(content, given.out)
    return 0 if all(row["right"] for row in checks.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
