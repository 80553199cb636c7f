"""Triton kernels on a GPU: each against its reference first, then how near to the device's limits.

    python benchmarks/gpu/kernel_rates.py --out benchmarks/results/gpu_kernels.json

Correctness comes first: one difference beyond the tolerances, or one row whose bits depend on its
batch in the invariant mode, and nothing is timed. Ceilings are measured in the same run: a copy of
1 GiB (bytes read and written per second) and a bfloat16 product of 8192 x 8192 x 8192. A kernel's
bound is the longer of bytes / copy rate and FLOPs / product rate; ``share`` = bound / median time.
Before each timed call a buffer larger than the L2 cache is overwritten, so that nothing is warm;
every sample is kept, in milliseconds.

Shapes: SmolLM2-135M and an 8B Llama; decode at batch 1, 8 and 64, contexts of 1,024 and 8,192.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rate_cases import SEED, Batch, Bench, Case, fault  # noqa: E402

from kernels.triton.shapes import LLAMA3_8B, SMOLLM2_135M, ModelShape  # noqa: E402

WARM_CALLS, TIMED_CALLS = 5, 30
FLUSH_BYTES = 256 << 20
"""Several times the 50 MiB of L2 cache of an H100 or H200."""
COPY_BYTES = 1 << 30
PRODUCT_SIDE = 8192


def times_ms(run: Callable[[], Any], flush: torch.Tensor) -> list[float]:
    """Milliseconds of calls one by one on the device, each after the L2 cache was overwritten."""
    for _ in range(WARM_CALLS):
        run()
    spans = []
    for _ in range(TIMED_CALLS):
        flush.zero_()
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
    """One row of the result; rates from the median time."""
    median_s = statistics.median(samples_ms) / 1e3
    return {
        "name": case.name,
        "median_ms": median_s * 1e3,
        "gigabytes_s": case.bytes / median_s / 1e9,
        "teraflops_s": case.flops / median_s / 1e12,
        "share": ceilings.bound_s(case.bytes, case.flops) / median_s,
        "samples_ms": samples_ms,
    }


def real_batches() -> list[Batch]:
    """Decode at three batches and two contexts, and prefill with and without a past."""
    decode = [Batch(s, 1, context) for s in (1, 8, 64) for context in (1024, 8192)]
    return [*decode, Batch(4, 3, 4096), Batch(1, 512, 512), Batch(1, 2048, 8192)]


def facts(device: torch.device) -> dict[str, Any]:
    """Where and with what it ran."""
    import triton

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": torch.cuda.get_device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seed": SEED,
        "warm_calls": WARM_CALLS,
    }


def dry_run(out: Path) -> int:
    """The checks of a tiny model in Triton's interpreter, whose products depend on the row."""
    tiny = ModelShape("tiny", 40, 6, 2, 16, 24, 300)
    bench = Bench(tiny, torch.device("cpu"), torch.float32)
    cases = [case for case in bench.cases([Batch(2, 1, 40)], [3]) if "bits of" not in case.name]
    faults = [wrong for case in cases if (wrong := fault(case)) is not None]
    out.write_text(json.dumps({"dry": True, "checked": len(cases), "faults": faults}) + "\n")
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--dry", action="store_true", help="tiny, interpreted, nothing is timed")
    arguments = parser.parse_args()
    if arguments.dry:
        return dry_run(arguments.out)
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    models, rows = (SMOLLM2_135M, LLAMA3_8B), [1, 64, 2048]
    for dtype in (torch.bfloat16, torch.float32):
        for model in models:
            small = [Batch(3, 1, 700), Batch(2, 130, 300), Batch(2, 3, 515)]
            batches = [*small, *(real_batches() if dtype is torch.bfloat16 else [])]
            for case in Bench(model, device, dtype).cases(batches, rows):
                wrong = fault(case)
                if wrong is not None:
                    print(f"wrong, nothing is timed: {model.name} {dtype}: {wrong}")
                    return 1
            print(f"right: {model.name} {dtype}")
    ceilings = measure_ceilings(device, flush)
    results = []
    for model in models:
        for case in Bench(model, device, torch.bfloat16).cases(real_batches(), rows):
            if case.bytes == 0:  # a check only
                continue
            row = summary(case, times_ms(case.run, flush), ceilings) | {"model": model.name}
            results.append(row)
            print(
                f"{model.name:<14} {case.name:<46} {row['median_ms']:8.4f} ms "
                f"{row['gigabytes_s']:7.0f} GB/s {row['teraflops_s']:6.1f} TFLOP/s "
                f"{row['share']:5.0%}"
            )
    content = facts(device) | {"ceilings": vars(ceilings), "results": results}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
