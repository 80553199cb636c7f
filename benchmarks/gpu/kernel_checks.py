"""Triton kernels on a GPU, each against its reference: right or wrong, case by case.

    python benchmarks/gpu/kernel_checks.py --model llama3-8b --dtype float32 --out build/checks.json

Few and many rows, odd sizes, empty tails, several queries at once; all within the tests'
tolerances, and what has to be exact to the bit. Any difference ends it with 1; what fails is
recorded by its error, and the rest goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from kernel_case import Batch, Case, check
from rate_cases import Bench
from resident_cases import ResidentBench
from running import Report, arguments

from kernels.triton.shapes import LLAMA3_8B, SMOLLM2_135M, ModelShape

MODELS = {model.name: model for model in (SMOLLM2_135M, LLAMA3_8B)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

BATCHES = [
    Batch(3, 1, 700),
    Batch(1, 1, 1),
    Batch(2, 130, 300),
    Batch(2, 3, 515),
    Batch(64, 1, 1024),
    Batch(1, 512, 512),
    Batch(1, 256, 4099),
]
ROWS = [1, 2, 3, 5, 64, 257]


def parts(dry: bool, model: str, dtype: str) -> Iterator[tuple[str, Iterator[Case]]]:
    """Of a GPU; ``dry``: of a tiny model in the interpreter, whose products depend on the row."""
    if not dry:
        device = torch.device("cuda")
        yield from Bench(MODELS[model], device, DTYPES[dtype]).parts(BATCHES, ROWS)
        if dtype == "bfloat16":
            yield "resident", ResidentBench(MODELS[model], device).cases()
        return
    tiny = ModelShape("tiny", 40, 6, 2, 16, 24, 300)
    bench = Bench(tiny, torch.device("cpu"), torch.float32)
    for name, cases in bench.parts([Batch(2, 1, 40)], [3]):
        yield name, (case for case in cases if "bits of" not in case.name)


def main() -> int:
    given = arguments(__doc__, model=list(MODELS), dtype=list(DTYPES))
    report = Report(__doc__, given)
    report.note(model=given.model, dtype=given.dtype)
    for name, cases in parts(given.dry, given.model, given.dtype):
        for case in report.each({"part": name}, cases):
            report.add({"case": case.name}, lambda case=case: check(case))
    return report.ended()


if __name__ == "__main__":
    sys.exit(main())
