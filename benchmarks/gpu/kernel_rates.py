"""Triton kernels on a GPU: how near each is to the device's limits.

    python benchmarks/gpu/kernel_rates.py --out build/gpu/kernel_rates.json

Correctness comes first: what differs from its reference beyond the tolerances is not timed.
Ceilings are measured in the same run: a copy of 1 GiB (bytes read and written per second) and a
bfloat16 product of 8192 x 8192 x 8192. A kernel's bound is the longer of bytes / copy rate and
FLOPs / product rate; ``share`` = bound / median time. Before each timed call a buffer larger than
the L2 cache is read, so that nothing is warm; every sample is kept, in milliseconds.

Shapes: an 8B Llama and SmolLM2-135M; decode at batch 1, 8 and 64, contexts of 1,024 and 8,192. At
few rows cuBLAS is timed beside the products of few rows.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from kernel_case import SEED, Batch, Case, check
from rate_cases import Bench
from running import Report, arguments

from kernels.triton.shapes import LLAMA3_8B, SMOLLM2_135M

WARM_CALLS, TIMED_CALLS = 5, 30
FLUSH_BYTES = 256 << 20
"""Several times the 50 MiB of L2 cache of an H100 or H200 (60 MB, as torch says of one)."""
SLEEP_CYCLES = 1_000_000
"""Half a millisecond at 2 GHz: several times what the host takes for a call."""
COPY_BYTES = 1 << 30
PRODUCT_SIDE = 8192


def times_ms(run: Callable[[], Any], flush: torch.Tensor) -> list[float]:
    """Milliseconds of calls one by one on the device, each after ``flush`` took the L2 cache.

    It is read, not written: what a cache holds of writes goes to memory when it is displaced, up to
    50 MB in the time of the call. The device sleeps before each, so that all of a call is queued
    when it begins: else the host's time to plan and to launch it would be measured.
    """
    for _ in range(WARM_CALLS):
        run()
    spans = []
    for _ in range(TIMED_CALLS):
        torch.cuda._sleep(SLEEP_CYCLES)
        flush.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in spans]


@dataclass(frozen=True)
class Ceilings:
    """Of the device, measured: bytes copied (read and written) and FLOPs of a product per second.

    ``launch_s``: median time of a launch that does next to nothing, which no kernel undercuts.
    """

    copy_bytes_s: float
    product_flops_s: float
    launch_s: float

    def bound_s(self, nbytes: int, flops: int) -> float:
        """Least time for this much work, however small."""
        return max(nbytes / self.copy_bytes_s, flops / self.product_flops_s)


def measure_ceilings(device: torch.device, flush: torch.Tensor) -> Ceilings:
    """By torch's own copy and product."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = statistics.median(times_ms(lambda: target.copy_(source), flush))
    side = PRODUCT_SIDE
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product_ms = statistics.median(times_ms(lambda: a @ b, flush))
    tiny = torch.zeros(1, device=device)
    launch_ms = statistics.median(times_ms(tiny.zero_, flush))
    return Ceilings(
        2 * COPY_BYTES / (copy_ms / 1e3), 2 * side**3 / (product_ms / 1e3), launch_ms / 1e3
    )


def summary(case: Case, samples_ms: list[float], ceilings: Ceilings) -> dict[str, Any]:
    """What is said of a case that is right; rates from the median time."""
    median_s = statistics.median(samples_ms) / 1e3
    return {
        "median_ms": median_s * 1e3,
        "gigabytes_s": case.bytes / median_s / 1e9,
        "teraflops_s": case.flops / median_s / 1e12,
        "share": ceilings.bound_s(case.bytes, case.flops) / median_s,
        "samples_ms": [round(sample, 5) for sample in samples_ms],
    }


class Rates:
    """Measures cases on a device, beside its ceilings, which the report gets."""

    def __init__(self, report: Report, device: torch.device) -> None:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # What displaces the L2 cache when it is read.
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        self._ceilings = measure_ceilings(device, self._flush)
        report.note(seed=SEED, warm_calls=WARM_CALLS, ceilings=asdict(self._ceilings))

    def row_of(self, case: Case) -> dict[str, Any]:
        """Its check and, if that is right, its times."""
        row = check(case)
        if row["right"]:
            row |= summary(case, times_ms(case.run, self._flush), self._ceilings)
        return row


def batches() -> list[Batch]:
    """Decode at three batches and two contexts, and prefill with and without a past."""
    decode = [Batch(s, 1, context) for context in (1024, 8192) for s in (1, 8, 64)]
    return [*decode, Batch(1, 512, 512), Batch(1, 2048, 8192)]


def main() -> int:
    given = arguments(__doc__)
    report = Report(__doc__, given)
    if given.dry:
        print("nothing is timed without a GPU")
        return report.ended()
    device = torch.device("cuda", torch.cuda.current_device())
    rates = Rates(report, device)
    for model in (LLAMA3_8B, SMOLLM2_135M):
        bench = Bench(model, device, torch.bfloat16)
        for name, cases in bench.parts(batches(), [1, 4, 64, 2048]):
            for case in report.each({"model": model.name, "part": name}, cases):
                if case.bytes:  # else a check only
                    key = {"model": model.name, "case": case.name}
                    report.add(key, lambda case=case: rates.row_of(case), needs_s=2.0)
    return report.ended()


if __name__ == "__main__":
    sys.exit(main())
