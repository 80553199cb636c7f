"""The engine on a GPU is right: logits against two oracles, graphs and batches bit by bit.

    python benchmarks/gpu/engine_checks.py --dtype float32 --out build/gpu/engine_checks.json

float32: the logits of prompts in chunks, then of each decoded token, against the reference
operations and against transformers on the same device. bfloat16: their error against the float32
oracle is at most twice that of transformers in bfloat16. Either: graphs: the logits of every token
have the same bits as when the same padded work is launched again, and when kernels overlap.
Batch-invariant mode: the same bits in other chunks, and alone as beside others. Any difference ends
it with 1; what fails is recorded by its error, and the rest goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bench_engine as bench
import torch
from random_llama import SMOLLM2, TINY, a_model, hugging_face, prompts
from running import Report, arguments, relative_error

from pop_node.engine.running.batch import build_batch
from pop_node.engine.scheduling.schedule import Row, Schedule

FLOAT32_ERROR = 1e-4
"""Relative, of a vector of logits: sums in another order, without tensor cores. float32 rounds to
6e-8; a difference of kind (a wrong mask or position) is far above."""

CONTEXT = 2048
"""Twice the least that graphs are for: an engine captures six, and not fifteen."""

BFLOAT16_RATIO = 2.0
"""Ours to transformers': both round as often, at other places."""

BFLOAT16_ERROR = 0.02
"""What transformers' is taken for where it is not installed. Guess: a layer rounds some ten times
to 2^-9, errors of 60 layers' halves add up like a random walk."""

Logits = dict[tuple[int, int], torch.Tensor]
"""By number of the sequence and index of the token."""

Forward = Callable[[list[int]], torch.Tensor]
"""From ids to the logits of all positions: [T, vocab]."""


class Checks:
    """Runs one model's prompts in engines that differ; collects what was found."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.dry = dry = given.dry
        self.dtype: str = given.dtype
        self.report = Report(__doc__, given)
        self.device = torch.device("cpu") if dry else torch.device("cuda")
        self.shape = TINY if dry else dataclasses.replace(SMOLLM2, context=CONTEXT)
        self.report.note(model=self.shape.name, dtype=self.dtype)
        lengths = (5, 37) if dry else (5, 300, 37, 1)
        drawn = prompts(self.shape, len(lengths), max(lengths))
        self.prompts = [ids[:length] for ids, length in zip(drawn, lengths, strict=True)]
        self.more = 3 if dry else 24

    def say(self, name: str, limit: float, measure: Callable[[], float]) -> None:
        """Find one figure, which must not be above ``limit``."""

        def checked() -> dict[str, Any]:
            value = measure()
            return {"value": value, "limit": limit, "right": value <= limit}

        self.report.add({"check": f"{self.dtype}: {name}"}, checked)

    def run(
        self,
        *,
        only: int | None = None,
        graphs: bool = True,
        batch_invariant: bool = False,
        overlap: bool = False,
        budget: int = 64,
        temperature: float = 0.0,
        form: str = "plain",
    ) -> Logits:
        """The logits of every token of every prompt, or of prompt number ``only``."""
        ops = bench.operations(self.dry, batch_invariant=batch_invariant, overlap=overlap)
        device = bench.a_device(self.dry)
        sampler = bench.RecordingSampler()
        numbers = [only] if only else list(range(1, len(self.prompts) + 1))
        chosen = [self.prompts[number - 1] for number in numbers]
        engine = bench.Engine(
            a_model(self.shape, self.dtype, ops, form),
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
        return max(relative_error(*pair) for pair in self.pairs(found, forward))

    def reference(self) -> Forward:
        """The model in float32 on the readable operations."""
        model = a_model(self.shape, "float32", bench.oracle(self.device))

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
        model = hugging_face(self.shape, dtype, self.device)
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


def float32_against_oracles(checks: Checks) -> None:
    """Logits against the reference and transformers, on the same device."""
    found: Logits = {}

    def against(forward: Forward) -> float:
        if not found:
            found.update(checks.run())
        return checks.error(found, forward)

    checks.say("against the reference", FLOAT32_ERROR, lambda: against(checks.reference()))
    theirs = checks.transformers("float32")
    if theirs is None:
        print("transformers is not installed: not compared")
    else:
        checks.say("against transformers", FLOAT32_ERROR, lambda: against(theirs))


def bfloat16_against_oracles(checks: Checks) -> None:
    """Our error against the float32 reference, to that of transformers; without it, at most its
    size."""

    def ratio() -> float:
        reference, theirs = checks.reference(), checks.transformers("bfloat16")
        half = checks.run()
        ours = checks.error(half, reference)
        checks.report.note(bfloat16_error=ours)
        if theirs is None:
            return ours / BFLOAT16_ERROR
        oracle = [expected for _, expected in checks.pairs(half, reference)]
        peer = [found for _, found in checks.pairs(half, theirs)]
        other = max(relative_error(*pair) for pair in zip(peer, oracle, strict=True))
        checks.report.note(bfloat16_error_of_transformers=other)
        return ours / other

    checks.say("our error to that of transformers", BFLOAT16_RATIO, ratio)


def bit_by_bit(checks: Checks) -> None:
    """Graphs, chunks and company; the interpreter's products depend on the row, so there only
    graphs."""

    replayed: Logits = {}

    def graphs() -> float:
        again = checks.run(temperature=0.8, graphs=False)
        replayed.update(checks.run(temperature=0.8))
        return same_bits(replayed, again)

    checks.say("tokens whose bits graphs change", 0, graphs)
    if checks.dry:
        return

    together: Logits = {}

    def against(other: Logits) -> float:
        if not together:
            together.update(checks.run(batch_invariant=True))
        return same_bits(together, other)

    def alone() -> Logits:
        found: Logits = {}
        for number in range(1, len(checks.prompts) + 1):
            found |= checks.run(batch_invariant=True, only=number)
        return found

    checks.say(
        "invariant: tokens that other chunks change",
        0,
        lambda: against(checks.run(batch_invariant=True, budget=17)),
    )
    checks.say("invariant: tokens that company changes", 0, lambda: against(alone()))

    def overlapping() -> float:
        return same_bits(replayed, checks.run(temperature=0.8, overlap=True))

    checks.say("tokens whose bits overlapping kernels change", 0, overlapping)


def resident_weights(checks: Checks) -> None:
    """Of the same bits: their error beside that of plain ones, graphs, and chunks bit by bit."""

    def ratio() -> float:
        reference = checks.reference()
        ours, plain = (
            checks.error(checks.run(form=form), reference) for form in ("resident", "plain")
        )
        checks.report.note(resident_error=ours, plain_error=plain)
        return ours / plain

    def graphs() -> float:
        again = checks.run(form="resident", temperature=0.8, graphs=False)
        return same_bits(checks.run(form="resident", temperature=0.8), again)

    def chunks() -> float:
        again = checks.run(form="resident", batch_invariant=True, budget=17)
        return same_bits(checks.run(form="resident", batch_invariant=True), again)

    checks.say("resident: our error to that of plain weights", BFLOAT16_RATIO, ratio)
    checks.say("resident: tokens whose bits graphs change", 0, graphs)
    checks.say("resident, invariant: tokens that other chunks change", 0, chunks)


def main() -> int:
    checks = Checks(arguments(__doc__, dtype=["float32", "bfloat16"]))
    if checks.dtype == "float32":
        float32_against_oracles(checks)
    else:
        bfloat16_against_oracles(checks)
        resident_weights(checks)
    bit_by_bit(checks)
    return checks.report.ended()


if __name__ == "__main__":
    sys.exit(main())
