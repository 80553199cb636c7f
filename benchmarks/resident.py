"""Decode and prefill with weights in the resident form against the same weights in 16 bits.

One process, one set of kernels, the two forms alternating pass by pass over the whole decoder. A
sample is a pass; ``tok_s`` is tokens over the median pass, ``cpu_ms_per_token`` the CPU time of all
threads over all passes. Every pass of the two must have the same logits, bit by bit, or nothing is
reported.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common.others import others_cpu_s
from common.report import command_line, facts, save

from kernels.decoder import Decoder
from kernels.meta import AttentionMeta
from kernels.ops import Ops, native_ops
from kernels.resident import ResidentMatrix
from pop_node.engine.config import WeightForm
from pop_node.models.llama import Llama
from pop_node.models.registry import load
from pop_node.models.tuning import BLOCK_TOKENS, CONTEXT, batch, matrices
from pop_node.store.store import Store

DECODE = (1, 2, 4, 8, 16)
PREFILL = (32, 128, 512)
FORMS: tuple[WeightForm, ...] = ("plain", "resident")
ROUNDS = {"decode": 60, "prefill": 10}
"""Passes of each form: half a second of each at batch 1."""


@dataclass
class Form:
    """One form of the weights, and what its passes took."""

    decode: Decoder
    cache: tuple[torch.Tensor, ...]
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def run(self, ids: torch.Tensor, meta: AttentionMeta, rows: torch.Tensor) -> torch.Tensor:
        """A pass and its time."""
        cpu, wall = time.process_time(), time.perf_counter()
        out = self.decode(ids, meta, self.cache, rows)
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)
        return out


def loaded(bundle: Path, ops: Ops, form: WeightForm) -> tuple[Llama, float, int]:
    """The model, the seconds that binding took, packing included, and the bytes of memory of its
    own that this process has more."""
    before = psutil.Process().memory_full_info().uss
    found = load(bundle, "bfloat16", ops, form=form)
    assert found.hold is not None
    found.hold.close()
    took = psutil.Process().memory_full_info().uss - before
    return found.model, found.phases["bind"].wall_s, took


def compare(
    forms: dict[str, Form], vocab: int, sequences: int, queries: int, context: int, rounds: int
) -> dict[str, Any]:
    """One kind of batch on both forms, alternating. Raises RuntimeError where bits differ."""
    meta, rows = batch(sequences, queries, context)
    tokens = sequences * queries
    rng = torch.Generator().manual_seed(tokens)
    others = others_cpu_s()
    began = time.perf_counter()
    for form in forms.values():
        form.wall_s.clear()
        form.cpu_s.clear()
    for number in range(rounds + 1):
        ids = torch.randint(0, vocab, (tokens,), generator=rng)
        order = list(forms) if number % 2 else list(forms)[::-1]
        logits = [forms[name].run(ids, meta, rows).clone() for name in order]
        if not torch.equal(logits[0], logits[1]):
            raise RuntimeError(f"logits differ at {sequences} x {queries}")
        if number == 0:  # warm-up
            for form in forms.values():
                form.wall_s.clear()
                form.cpu_s.clear()
    result: dict[str, Any] = {
        name: {
            "tok_s": round(tokens / statistics.median(form.wall_s), 1),
            "cpu_ms_per_token": round(1e3 * sum(form.cpu_s) / rounds / tokens, 3),
            "wall_ms": [round(1e3 * s, 3) for s in form.wall_s],
        }
        for name, form in forms.items()
    }
    pairs = zip(forms["plain"].wall_s, forms["resident"].wall_s, strict=True)
    result["speedup"] = round(statistics.median(a / b for a, b in pairs), 3)
    result["speedup_cpu"] = round(sum(forms["plain"].cpu_s) / sum(forms["resident"].cpu_s), 3)
    spent = time.perf_counter() - began
    result["others_cpu_share"] = round((others_cpu_s() - others) / spent, 2)
    return result


def measure(bundle: Path, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both forms on ``threads`` threads."""
    ops = native_ops(threads, args.isa)
    assert ops.decoder is not None
    loads = {form: loaded(bundle, ops, form) for form in FORMS}
    model, plain = loads["plain"][0], loads["plain"][0].weights
    resident = loads["resident"][0].weights
    blocks = max(max(DECODE) * -(-CONTEXT // BLOCK_TOKENS), max(PREFILL) // BLOCK_TOKENS)
    forms = {
        name: Form(ops.decoder(weights), model.allocate_cache(blocks, BLOCK_TOKENS))
        for name, weights in (("plain", plain), ("resident", resident))
    }
    vocab = model.config.vocab_size
    found = matrices(resident)
    report: dict[str, Any] = {
        "backend": ops.name,
        "bind_s": {form: round(load[1], 3) for form, load in loads.items()},
        "load_memory_mb": {form: round(load[2] / 2**20, 1) for form, load in loads.items()},
        "plain_bytes": sum(weight.nbytes for weight in matrices(plain)),
        "resident_bytes": sum(weight.nbytes for weight in found),
        "matrices": len(found),
        "matrices_kept_plain": sum(not isinstance(w, ResidentMatrix) for w in found),
        "escapes": sum(len(w.escapes) for w in found if isinstance(w, ResidentMatrix)),
        "decode": {},
        "prefill": {},
    }
    for count in DECODE:
        rounds = max(8, round(args.rounds * ROUNDS["decode"] / count**0.5))
        report["decode"][str(count)] = compare(forms, vocab, count, 1, CONTEXT, rounds)
    for count in PREFILL:
        rounds = max(3, round(args.rounds * ROUNDS["prefill"] * 32 / (count + 32)))
        report["prefill"][str(count)] = compare(forms, vocab, 1, count, count, rounds)
    return report


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="store that holds smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", help="instruction set; the fastest if not given")
    parser.add_argument("--rounds", type=float, default=1.0, help="times the usual passes")
    args = parser.parse_args()
    torch.set_num_threads(1)  # torch's own threads would spin beside the passes
    bundle = Store(args.store).get("smollm2-135m").path
    report = facts(__doc__, ["torch"])
    report["threads"] = {}
    for threads in args.threads:
        turn = measure(bundle, threads, args)
        report["threads"][str(threads)] = turn
        print(threads, turn["backend"], "bound in s:", turn["bind_s"], end=" ")
        print(f"{turn['resident_bytes'] / turn['plain_bytes']:.4f} of the bytes", end=" ")
        print("MB in memory:", turn["load_memory_mb"])
        for kind in ("decode", "prefill"):
            for count, row in turn[kind].items():
                both = [row[name] for name in ("plain", "resident")]
                print(f"{kind} {count}:", *(each["tok_s"] for each in both), "tok/s,", end=" ")
                print(*(each["cpu_ms_per_token"] for each in both), "ms CPU,", end=" ")
                print(row["speedup"], row["speedup_cpu"], "others", row["others_cpu_share"])
    save(report, args.out)


if __name__ == "__main__":
    main()
