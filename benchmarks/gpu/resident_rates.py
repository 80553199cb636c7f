"""Resident weights on a GPU: unpacking against a copy, products against cuBLAS in bfloat16.

    python benchmarks/gpu/resident_rates.py --out build/gpu/resident_rates.json

Correctness comes first: what differs from its reference beyond the tolerances is not timed, as in
``kernel_rates``, whose ceilings and ways of timing these are. ``share`` is of the time that a copy
takes for the bytes that a kernel must move, 1.5 to a weight (aim for unpacking: 0.7).
``speedup`` = median time of cuBLAS / median time of the resident product (aim at one row: 1.15).

Shapes: the matrices of an 8B Llama, at 1, 4, 16, 64 and 512 rows.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from kernel_case import Case, check
from kernel_rates import Rates
from resident_cases import ResidentBench
from running import Report, arguments

from kernels.triton.shapes import LLAMA3_8B, ModelShape

TINY = ModelShape("tiny", 64, 8, 2, 16, 128, 300)
"""Matrices that the form makes smaller."""


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each product that was timed both ways."""
    medians = {row["case"]: row["median_ms"] for row in rows if "median_ms" in row}
    found = []
    for case, median_ms in medians.items():
        way, _, product = case.partition(" ")
        theirs = medians.get(f"cuBLAS {product}")
        if way in ("resident", "invariant") and theirs is not None:
            found.append({"product": product, "way": way, "speedup": theirs / median_ms})
    return found


def main() -> int:
    given = arguments(__doc__)
    report = Report(__doc__, given)
    if given.dry:
        bench = ResidentBench(TINY, torch.device("cpu"))
        for case in report.each({"part": "resident"}, bench.cases((1, 2))):
            # The interpreter knows no products of bfloat16, and its others depend on the row.
            if not case.name.startswith("cuBLAS") and "bits of" not in case.name:
                report.add({"case": case.name}, lambda case=case: check(case))
        return report.ended()
    device = torch.device("cuda", torch.cuda.current_device())
    rates = Rates(report, device)

    def measure(case: Case) -> dict[str, Any]:
        return rates.row_of(case) if case.bytes else check(case)

    for case in report.each({"part": "resident"}, ResidentBench(LLAMA3_8B, device).cases()):
        report.add({"case": case.name}, lambda case=case: measure(case), needs_s=2.0)
        report.note(speedups=speedups(report.rows))
    return report.ended()


if __name__ == "__main__":
    sys.exit(main())
