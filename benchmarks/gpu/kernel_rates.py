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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from kernels.meta import AttentionMeta  # noqa: E402
from kernels.reference import activation, attention, kv_pack, linear, norm, rope  # noqa: E402
from kernels.reference import sampling as reference_sampling  # noqa: E402
from kernels.triton import kv_pack as triton_kv_pack  # noqa: E402
from kernels.triton import linear as triton_linear  # noqa: E402
from kernels.triton.ops import TritonOps  # noqa: E402
from kernels.triton.sampling import pack_parameters, sample_on_device  # noqa: E402
from kernels.triton.shapes import LLAMA3_8B, SMOLLM2_135M, ModelShape  # noqa: E402

BLOCK_TOKENS = 16
SEED = 20240607
WARM_CALLS, TIMED_CALLS = 5, 30
FLUSH_BYTES = 256 << 20
"""Several times the 50 MiB of L2 cache of an H100 or H200."""
COPY_BYTES = 1 << 30
PRODUCT_SIDE = 8192

# As in the tests: |triton - reference| <= atol + rtol |reference|, results being of magnitude 1.
TOLERANCE = {
    torch.float32: (2e-5, 2e-5),
    torch.float16: (1e-3, 2e-3),
    torch.bfloat16: (1e-2, 1.6e-2),
}

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    ``run`` is what is timed, ``pairs`` computes (result, reference) for the check. ``bytes`` and
    ``flops``: what has to be moved and computed at least. ``exact``: bits must agree.
    """

    name: str
    run: Callable[[], Any]
    pairs: Callable[[], Pairs]
    bytes: int
    flops: int
    exact: bool = False


@dataclass(frozen=True)
class Batch:
    """``sequences`` of ``queries`` new tokens at ``context`` tokens each."""

    sequences: int
    queries: int
    context: int

    @property
    def rows(self) -> int:
        return self.sequences * self.queries

    @property
    def visible(self) -> int:
        """Pairs of a query and a key it sees, of one head."""
        before = self.context - self.queries
        return self.sequences * (self.queries * before + self.queries * (self.queries + 1) // 2)

    def __str__(self) -> str:
        return f"{self.sequences} x {self.queries} at {self.context}"


def layout(batch: Batch, device: torch.device, rng: torch.Generator) -> tuple[AttentionMeta, int]:
    """Blocks in random order, and how many there are."""
    width = -(-batch.context // BLOCK_TOKENS)
    blocks = batch.sequences * width
    tables = torch.randperm(blocks, generator=rng).view(batch.sequences, width)
    first = batch.context - batch.queries
    position = torch.arange(first, batch.context).repeat(batch.sequences)
    owner = torch.arange(batch.sequences).repeat_interleave(batch.queries)
    slots = tables[owner, position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
    starts = torch.arange(batch.sequences + 1, dtype=torch.int32) * batch.queries
    contexts = torch.full((batch.sequences,), batch.context, dtype=torch.int32)
    meta = AttentionMeta(
        positions=position.to(device),
        slots=slots.to(device),
        query_starts=starts.to(device),
        context_lens=contexts.to(device),
        block_tables=tables.to(device, torch.int32),
        block_tokens=BLOCK_TOKENS,
        max_query=batch.queries,
        max_context=batch.context,
        query_lens_host=[batch.queries] * batch.sequences,
        context_lens_host=[batch.context] * batch.sequences,
    )
    return meta, blocks


class Bench:
    """Makes cases of one model on one device in one dtype."""

    def __init__(self, model: ModelShape, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._rng = torch.Generator().manual_seed(SEED)
        count = 4
        if device.type == "cuda":
            count = torch.cuda.get_device_properties(device).multi_processor_count
        self._ops = TritonOps(count)
        self._invariant = TritonOps(count, batch_invariant=True)

    def _random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self._rng) * scale
        return drawn.to(self._device, self._dtype)

    def cases(self, batches: list[Batch], rows: list[int]) -> Iterator[Case]:
        """Row-wise kernels at every count of ``rows``, attention and rotation at every batch."""
        for count in rows:
            yield from self._row_wise(count)
            yield from self._products(count)
        for batch in batches:
            yield from self._attention(batch)
        yield from self._kv()
        yield from self._sampling(min(rows))

    def _row_wise(self, rows: int) -> Iterator[Case]:
        m, ops, size = self._model, self._ops, self._dtype.itemsize
        x, residual = self._random(rows, m.hidden), self._random(rows, m.hidden)
        weight = self._random(m.hidden)
        yield Case(
            f"add_rms_norm {rows}",
            lambda: ops.add_rms_norm(x, residual, weight, 1e-5),
            lambda: list(
                zip(
                    ops.add_rms_norm(x, residual, weight, 1e-5),
                    norm.add_rms_norm(x, residual, weight, 1e-5),
                    strict=True,
                )
            ),
            4 * rows * m.hidden * size,
            5 * rows * m.hidden,
        )
        gate_up = self._random(rows, 2 * m.intermediate)
        yield Case(
            f"silu_mul {rows}",
            lambda: ops.silu_mul(gate_up),
            lambda: [(ops.silu_mul(gate_up), activation.silu_mul(gate_up))],
            3 * rows * m.intermediate * size,
            6 * rows * m.intermediate,
        )

    def _products(self, rows: int) -> Iterator[Case]:
        m, size = self._model, self._dtype.itemsize
        x = self._random(rows, m.hidden)
        weight = self._random(2 * m.intermediate, m.hidden, scale=m.hidden**-0.5)
        moved = (x.numel() + weight.numel() + rows * weight.shape[0]) * size
        for name, ops in (("linear", self._ops), ("linear, invariant", self._invariant)):
            yield Case(
                f"{name} {rows} x {m.hidden} x {weight.shape[0]}",
                lambda ops=ops: ops.linear(x, weight, None),
                lambda ops=ops: [(ops.linear(x, weight, None), linear.linear(x, weight, None))],
                moved,
                2 * rows * weight.numel(),
            )
        yield Case(
            f"linear, invariant: bits of the first row {rows}",
            lambda: None,
            lambda: [
                (triton_linear.invariant_logits(x[:1], weight),
                 triton_linear.invariant_logits(x, weight)[:1])
            ],
            0,
            0,
            exact=True,
        )  # fmt: skip

    def _attention(self, batch: Batch) -> Iterator[Case]:
        m, ops, size = self._model, self._ops, self._dtype.itemsize
        meta, blocks = layout(batch, self._device, self._rng)
        keys, values = (
            self._random(blocks, BLOCK_TOKENS, m.kv_heads, m.head_dim) for _ in range(2)
        )
        heads = [m.heads, m.kv_heads, m.kv_heads]
        fused = self._random(batch.rows, sum(heads), m.head_dim)
        q, k, v = fused.split(heads, dim=1)
        angles = torch.rand(batch.context, m.head_dim // 2, generator=self._rng) * 6
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self._device)

        def rotated(write: Callable[..., None]) -> list[torch.Tensor]:
            parts, caches = fused.clone(), (keys.clone(), values.clone())
            write(*parts.split(heads, dim=1), cos_sin, meta, *caches)
            return [parts, *caches]

        token = (2 * m.heads + 5 * m.kv_heads) * m.head_dim * size + m.head_dim * 4
        yield Case(
            f"rope_kv_write {batch}",
            lambda: ops.rope_kv_write(q, k, v, cos_sin, meta, keys, values),
            lambda: list(zip(rotated(ops.rope_kv_write), rotated(rope.rope_kv_write), strict=True)),
            batch.rows * token,
            3 * batch.rows * (m.heads + m.kv_heads) * m.head_dim,
        )
        scale = m.head_dim**-0.5
        moved = 2 * batch.rows * m.heads * m.head_dim * size
        moved += 2 * batch.sequences * batch.context * m.kv_heads * m.head_dim * size
        for name, table in (("attention", ops), ("attention, invariant", self._invariant)):
            yield Case(
                f"{name} {batch}",
                lambda table=table: table.attention(q, keys, values, meta, scale),
                lambda table=table: [
                    (table.attention(q, keys, values, meta, scale),
                     attention.attention(q, keys, values, meta, scale))
                ],
                moved,
                4 * batch.visible * m.heads * m.head_dim,
            )  # fmt: skip
        window = max(1, batch.context // 8)
        yield Case(
            f"attention, window {window} {batch}",
            lambda: None,
            lambda: [
                (ops.attention(q, keys, values, meta, scale, window=window),
                 attention.attention(q, keys, values, meta, scale, window=window))
            ],
            0,
            0,
        )  # fmt: skip

    def _kv(self) -> Iterator[Case]:
        m = self._model
        cache = self._random(4, 64, BLOCK_TOKENS, m.kv_heads, m.head_dim)
        slots = torch.randperm(64 * BLOCK_TOKENS, generator=self._rng)[:512].to(self._device)
        piece = kv_pack.kv_pack(cache, slots, 1, 4)

        def unpacked(write: Callable[..., None]) -> torch.Tensor:
            target = torch.zeros_like(cache)
            write(piece, target, slots, 1)
            return target

        moved = 2 * piece.numel() * piece.element_size()
        yield Case(
            "kv_pack",
            lambda: triton_kv_pack.kv_pack(cache, slots, 1, 4),
            lambda: [(triton_kv_pack.kv_pack(cache, slots, 1, 4), piece)],
            moved,
            0,
            exact=True,
        )
        yield Case(
            "kv_unpack",
            lambda: triton_kv_pack.kv_unpack(piece, cache, slots, 1),
            lambda: [(unpacked(triton_kv_pack.kv_unpack), unpacked(kv_pack.kv_unpack))],
            moved,
            0,
            exact=True,
        )

    def _sampling(self, rows: int) -> Iterator[Case]:
        logits = (3 * torch.randn(rows, self._model.vocab, generator=self._rng)).to(self._device)
        for top_p in (1.0, 0.9):
            settings = ([0.8] * rows, [top_p] * rows, list(range(rows)), [0] * rows, [7] * rows)
            parameters = pack_parameters(*settings).to(self._device)
            yield Case(
                f"sample top_p {top_p} {rows}",
                lambda parameters=parameters: sample_on_device(logits, parameters),
                lambda parameters=parameters, settings=settings: [
                    (sample_on_device(logits, parameters).cpu(),
                     torch.tensor(reference_sampling.gumbel_sample(logits.cpu(), *settings)))
                ],
                logits.numel() * (8 if top_p == 1 else 24),
                0,
                exact=True,
            )  # fmt: skip


def fault(case: Case) -> str | None:
    """What is wrong with its results; None if nothing is."""
    for actual, expected in case.pairs():
        if case.exact:
            if not torch.equal(actual, expected):
                return f"{case.name}: {int((actual != expected).sum())} elements differ"
            continue
        atol, rtol = TOLERANCE[actual.dtype]
        wide, oracle = actual.float(), expected.float()
        excess = ((wide - oracle).abs() - rtol * oracle.abs()).max()
        if not bool(excess <= atol):  # NaN too
            return f"{case.name}: off by {excess.item():.3g} beyond the relative tolerance"
    return None


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
