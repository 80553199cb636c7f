"""Tokens per second of the engine on a GPU, against bytes / bandwidth and against transformers.

    python benchmarks/gpu/decode_rates.py --out build/gpu/decode_rates.json

Random Llamas in bfloat16 of the shapes of SmolLM2-135M and of an 8B model; greedy. Decode: batches
of 1, 8 and 64 at contexts of about 1,024 and 8,192 tokens, whose KV is random. Its bound is the
bytes that a step must read (weights + KV) / copy bandwidth of the device, measured here:
``share`` = bound / time of a step. Also timed: replays of the step's graph alone, so that
``overhead`` = 1 - replay / step says what scheduling, copies and sampling cost. Prefill: a prompt
in chunks, its FLOPs per second to those of a large product, measured here: ``share``. transformers
decodes with its dynamic cache, which holds as many tokens. Medians of rounds; every one is kept.
What fails is recorded by its error, and the rest goes on.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bench_engine as bench
import torch

PEER_KV_BYTES = 20 << 30
"""transformers copies its cache whenever a token is added: larger ones would not fit twice."""


@dataclass(frozen=True)
class Plan:
    """What is run. ``budget``: tokens of a prefill step. ``until_s``: when to leave out what has
    not begun, from the start."""

    dry: bool
    shapes: tuple[bench.Shape, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    warm: int
    steps: int
    rounds: int
    peer_steps: int
    peer_rounds: int
    budget: int
    prefill: int
    until_s: float


REAL = Plan(
    dry=False,
    shapes=(bench.LLAMA_8B, bench.SMOLLM2),
    batches=(1, 8, 64),
    contexts=(1024, 8192),
    warm=8,
    steps=24,
    rounds=4,
    peer_steps=8,
    peer_rounds=3,
    budget=2048,
    prefill=8192,
    until_s=190.0,
)
DRY = Plan(
    dry=True,
    shapes=(bench.TINY,),
    batches=(1, 2),
    contexts=(40,),
    warm=1,
    steps=1,
    rounds=2,
    peer_steps=2,
    peer_rounds=1,
    budget=48,
    prefill=50,
    until_s=1000.0,
)


class LastReplay:
    """A device that remembers which graph ran last."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.last: Callable[[], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = self._device.capture(work)

        def replay() -> None:
            self.last = graph
            graph()

        return replay


def rounds_of(run: Callable[[], None], steps: int, rounds: int, dry: bool) -> list[float]:
    """Seconds per step of each round."""
    return [bench.seconds_of(run, dry) / steps for _ in range(rounds)]


def decode(
    engine: bench.Engine,
    device: LastReplay,
    shape: bench.Shape,
    batch: int,
    context: int,
    plan: Plan,
) -> dict[str, Any]:
    """The engine's own steps, then the last one's graph alone."""
    more = plan.warm + plan.steps * plan.rounds + 4
    prompts = bench.prompts(shape, batch, context - more)
    sequences = engine.receive(prompts, more)
    device.last = None
    engine.steps(plan.warm)

    def steps() -> None:
        engine.steps(plan.steps)

    step_s = rounds_of(steps, plan.steps, plan.rounds, plan.dry)
    engine.drop(sequences)
    replay_s: list[float] = []
    graph = device.last
    if graph is not None:

        def replays() -> None:
            for _ in range(plan.steps):
                graph()

        replay_s = rounds_of(replays, plan.steps, plan.rounds, plan.dry)
    mean = context - more + 1 + plan.warm + plan.steps * plan.rounds / 2
    return {"step_s": step_s, "replay_s": replay_s, "mean_context": mean}


def prefill(engine: bench.Engine, shape: bench.Shape, plan: Plan) -> dict[str, Any]:
    """Seconds of a whole prompt, its first token included."""
    prompts = bench.prompts(shape, plan.rounds + 1, plan.prefill)
    seconds = []
    for prompt in prompts:
        engine.add(prompt, 1)
        seconds.append(bench.seconds_of(engine.run, plan.dry))
        engine.pool.forget()
    # A product per weight and token; queries and keys: half of all pairs, twice (scores, values).
    products = 2 * (shape.read_weights - shape.vocab * shape.hidden) * plan.prefill
    pairs = plan.prefill * (plan.prefill + 1) // 2
    attention = 4 * pairs * shape.layers * shape.heads * shape.head_dim
    return {"seconds": seconds[1:], "tokens": plan.prefill, "flops": products + attention}


def peer_decode(
    model: Any, shape: bench.Shape, batch: int, context: int, plan: Plan
) -> list[float]:
    """Seconds of transformers' steps per round."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    kind = next(model.parameters()).dtype
    cache = DynamicCache()
    for layer in range(shape.layers):
        size = (batch, shape.kv_heads, context, shape.head_dim)
        keys, values = (torch.randn(size, dtype=kind, device=device) for _ in range(2))
        cache.update(keys, values, layer)
    ids = torch.ones(batch, 1, dtype=torch.int64, device=device)

    def steps() -> None:
        nonlocal ids
        with torch.inference_mode():
            for _ in range(plan.peer_steps):
                found = model(input_ids=ids, past_key_values=cache, use_cache=True)
                ids = found.logits[:, -1].argmax(dim=-1, keepdim=True)

    steps()
    return rounds_of(steps, plan.peer_steps, plan.peer_rounds, plan.dry)


def of_engine(
    shape: bench.Shape, plan: Plan, ceilings: dict[str, float], say: Callable[..., None]
) -> None:
    """Everything of one shape on our engine."""
    dtype = "float32" if plan.dry else "bfloat16"
    size = 4 if plan.dry else 2
    device = LastReplay(bench.a_device(plan.dry))
    model = bench.a_model(shape, dtype, bench.operations(plan.dry))
    seats, longest = max(plan.batches), max(plan.contexts)
    tokens = seats * (longest + 2 * bench.BLOCK_TOKENS)
    engine = bench.Engine(model, device, tokens, seats=seats, budget=plan.budget)
    for component in engine.runner.cache:
        for layer in component:
            layer.normal_()

    def capture() -> dict[str, Any]:
        began, count = time.perf_counter(), 0
        while engine.runner.prepare():
            count += 1
        return {"graphs": count, "seconds": time.perf_counter() - began}

    say({"engine": "popmesh", "model": shape.name, "captures": True}, capture)
    for batch in plan.batches:
        for context in plan.contexts:
            key = {"engine": "popmesh", "model": shape.name, "batch": batch, "context": context}

            def measure(batch: int = batch, context: int = context) -> dict[str, Any]:
                row = decode(engine, device, shape, batch, context, plan)
                moved = shape.read_weights + batch * row["mean_context"] * shape.kv_elements
                # A copy's bytes count twice: read and written. A step reads at the same rate.
                bound_s = moved * size / ceilings["copy_bytes_s"]
                step_s = statistics.median(row["step_s"])
                row |= {
                    "tokens_s": batch / step_s,
                    "bound_s": bound_s,
                    "share": bound_s / step_s,
                }
                if row["replay_s"]:
                    row["overhead"] = 1 - statistics.median(row["replay_s"]) / step_s
                return row

            say(key, measure)

    def measure_prefill() -> dict[str, Any]:
        row = prefill(engine, shape, plan)
        rate = row["flops"] / statistics.median(row["seconds"])
        return row | {"flops_s": rate, "share": rate / ceilings["product_flops_s"]}

    say({"engine": "popmesh", "model": shape.name, "prefill": plan.prefill}, measure_prefill)


def of_transformers(
    shape: bench.Shape, plan: Plan, ceilings: dict[str, float], say: Callable[..., None]
) -> None:
    """Decode of one shape on transformers, where it is installed."""
    dtype = "float32" if plan.dry else "bfloat16"
    device = torch.device("cpu") if plan.dry else torch.device("cuda")
    model = bench.hugging_face(shape, dtype, device)
    if model is None:
        return
    for batch in plan.batches:
        for context in plan.contexts:
            if batch * context * shape.kv_elements * 2 > PEER_KV_BYTES:
                continue
            key = {"engine": "transformers", "model": shape.name}

            def measure(batch: int = batch, context: int = context) -> dict[str, Any]:
                step_s = peer_decode(model, shape, batch, context, plan)
                return {"step_s": step_s, "tokens_s": batch / statistics.median(step_s)}

            say(key | {"batch": batch, "context": context}, measure)


def main() -> int:
    given = bench.arguments(__doc__)
    plan = DRY if given.dry else REAL
    began = time.monotonic()
    content = bench.facts(__doc__, plan.dry) | {"ceilings": bench.ceilings(plan.dry)}
    rows: list[dict[str, Any]] = []
    content["rows"] = rows

    def say(key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() - began > plan.until_s:
            row = {"left_out": "no time was left"}
        else:
            try:
                row = measure()
            except (RuntimeError, ValueError, TypeError, AttributeError) as exc:
                row = {"error": f"{type(exc).__name__}: {exc}"[:2000]}
        rows.append(key | row)
        shown = {name: value for name, value in rows[-1].items() if not isinstance(value, list)}
        print(shown, flush=True)
        bench.save(content, given.out)  # what is known so far, should the time run out

    for shape in plan.shapes:
        for part in (of_engine, of_transformers):
            try:
                part(shape, plan, content["ceilings"], say)
            except (RuntimeError, ValueError, TypeError, AttributeError) as exc:
                rows.append({"model": shape.name, "part": part.__name__, "error": str(exc)[:2000]})
                print(rows[-1], flush=True)
            gc.collect()
            if not plan.dry:
                torch.cuda.empty_cache()
    bench.save(content, given.out)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
