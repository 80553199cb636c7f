"""Tokens per second of the engine on a GPU, against bytes / bandwidth and against transformers.

    python benchmarks/gpu/decode_rates.py --model llama3-8b --out build/gpu/decode_rates.json

A random Llama in bfloat16 of the shape of SmolLM2-135M or of an 8B model; greedy. ``--engine``:
ours or transformers; ``--form``: of our weights, plain or resident in 12 bits. Decode: batches of
1, 8 and 64 at contexts of about 1,024 and 8,192 tokens, whose KV is random. Its bound is the
bytes that a step must read (weights + KV) / copy bandwidth of the device, measured here:
``share`` = bound / time of a step. Also timed: replays of the step's graph alone, so that
``overhead`` = 1 - replay / step says what scheduling, copies and sampling cost. Prefill: a prompt
in chunks, its FLOPs per second to those of a large product, measured here: ``share``. Last come the
kernels of a replay with their times, by torch's profiler; then steps of one sequence again, with
kernels that overlap (``kernels.triton.overlap``). transformers
decodes with its dynamic cache, which holds as many tokens. Medians of rounds; every one is kept.
What fails is recorded by its error, and the rest goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bench_engine as bench
import torch
from random_llama import LLAMA_8B, SEED, SMOLLM2, TINY, Shape, a_model, hugging_face, prompts
from running import Report, arguments, ceilings, seconds_of

PEER_KV_BYTES = 20 << 30
"""transformers copies its cache whenever a token is added: larger ones would not fit twice."""


@dataclass(frozen=True)
class Plan:
    """What is run. ``budget``: tokens of a prefill step."""

    dry: bool
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    warm: int
    steps: int
    rounds: int
    peer_steps: int
    peer_rounds: int
    budget: int
    prefill: int


REAL = Plan(
    dry=False,
    batches=(1, 8, 64),
    contexts=(1024, 8192),
    warm=8,
    steps=24,
    rounds=4,
    peer_steps=8,
    peer_rounds=3,
    budget=2048,
    prefill=8192,
)
DRY = Plan(
    dry=True,
    batches=(1, 2),
    contexts=(40,),
    warm=1,
    steps=1,
    rounds=2,
    peer_steps=2,
    peer_rounds=1,
    budget=48,
    prefill=50,
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
    return [seconds_of(run, dry) / steps for _ in range(rounds)]


def decode(
    engine: bench.Engine,
    device: LastReplay,
    shape: Shape,
    batch: int,
    context: int,
    plan: Plan,
) -> dict[str, Any]:
    """The engine's own steps, then the last one's graph alone."""
    more = plan.warm + plan.steps * plan.rounds + 4
    sequences = engine.receive(prompts(shape, batch, context - more), more)
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


def prefill(engine: bench.Engine, shape: Shape, plan: Plan) -> dict[str, Any]:
    """Seconds of a whole prompt, its first token included."""
    seconds = []
    for prompt in prompts(shape, plan.rounds + 1, plan.prefill):
        engine.add(prompt, 1)
        seconds.append(seconds_of(engine.run, plan.dry))
        engine.pool.forget()
    # A product per weight and token; queries and keys: half of all pairs, twice (scores, values).
    products = 2 * (shape.read_weights - shape.vocab * shape.hidden) * plan.prefill
    pairs = plan.prefill * (plan.prefill + 1) // 2
    attention = 4 * pairs * shape.layers * shape.heads * shape.head_dim
    return {"seconds": seconds[1:], "tokens": plan.prefill, "flops": products + attention}


def peer_decode(model: Any, shape: Shape, batch: int, context: int, plan: Plan) -> list[float]:
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


def kernels_of(graph: Callable[[], None]) -> dict[str, Any]:
    """Count and microseconds of each kernel in a replay, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    graph()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        graph()
        torch.cuda.synchronize()
    named = [(e.key[:120], e.count, e.self_device_time_total) for e in found.key_averages()]
    named.sort(key=lambda each: -each[2])
    return {"kernels": named, "busy_us": sum(each[2] for each in named)}


class Measured:
    """One shape's rows."""

    def __init__(self, shape: Shape, plan: Plan, given: argparse.Namespace) -> None:
        self._shape, self._plan = shape, plan
        self._dtype = "float32" if plan.dry else "bfloat16"
        self._size = 4 if plan.dry else 2
        self._form = given.form
        self._weight_bytes = self._size * (0.75 if self._form == "resident" else 1.0)
        self._key = {"engine": given.engine, "model": shape.name, "weights": self._form}
        self.report = Report(__doc__, given)
        self._ceilings = ceilings(plan.dry)
        self.report.note(seed=SEED, ceilings=self._ceilings)

    def of_engine(self, *, overlap: bool = False, graphs: bool = True) -> bool:
        """Everything on our engine; with kernels that ``overlap``, steps of one sequence. False
        when graphs could not be captured: nothing else was done."""
        shape, plan = self._shape, self._plan
        key = self._key | ({"overlap": True} if overlap else {})
        key |= {} if graphs else {"graphs": False}
        batches = (1,) if overlap else plan.batches
        own = bench.a_device(plan.dry)
        device = LastReplay(own if graphs else bench.WithoutGraphs(own))
        seats, longest = max(batches), max(plan.contexts)
        tokens = seats * (longest + 2 * bench.BLOCK_TOKENS)
        made: list[bench.Engine] = []

        def make() -> dict[str, Any]:
            ops = bench.operations(plan.dry, overlap=overlap)
            model = a_model(shape, self._dtype, ops, self._form)
            engine = bench.Engine(model, device, tokens, seats=seats, budget=plan.budget)
            for component in engine.runner.cache:
                for layer in component:
                    layer.normal_()
            made.append(engine)
            return {}

        def capture() -> dict[str, Any]:
            began, count = time.perf_counter(), 0
            while made[0].runner.prepare():
                count += 1
            return {"graphs": count, "seconds": time.perf_counter() - began}

        self.report.add(key | {"made": True}, make)
        if not made or "error" in self.report.add(key | {"captures": True}, capture):
            return False
        for context in plan.contexts:
            for batch in batches:

                def measure(batch: int = batch, context: int = context) -> dict[str, Any]:
                    return self._decode(made[0], device, batch, context)

                self.report.add(key | {"batch": batch, "context": context}, measure, 10.0)
        if not overlap:
            self.report.add(
                key | {"prefill": plan.prefill}, lambda: self._prefill(made[0]), needs_s=10.0
            )
        if plan.dry:
            return True
        for context in plan.contexts:
            for batch in batches:
                which = {"kernels_of_batch": batch, "context": context}

                def profiled(batch: int = batch, context: int = context) -> dict[str, Any]:
                    short = dataclasses.replace(plan, steps=1, rounds=1)
                    decode(made[0], device, shape, batch, context, short)
                    # At once: the step's numbers have to be there still.
                    return {} if device.last is None else kernels_of(device.last)

                self.report.add(key | which, profiled, needs_s=10.0)
        return True

    def _decode(
        self, engine: bench.Engine, device: LastReplay, batch: int, context: int
    ) -> dict[str, Any]:
        shape = self._shape
        row = decode(engine, device, shape, batch, context, self._plan)
        moved = shape.read_weights * self._weight_bytes
        moved += batch * row["mean_context"] * shape.kv_elements * self._size
        # A copy's bytes count twice: read and written. A step reads at the same rate.
        bound_s = moved / self._ceilings["copy_bytes_s"]
        step_s = statistics.median(row["step_s"])
        row |= {"tokens_s": batch / step_s, "bound_s": bound_s, "share": bound_s / step_s}
        if row["replay_s"]:
            row["overhead"] = 1 - statistics.median(row["replay_s"]) / step_s
        return row

    def _prefill(self, engine: bench.Engine) -> dict[str, Any]:
        row = prefill(engine, self._shape, self._plan)
        rate = row["flops"] / statistics.median(row["seconds"])
        return row | {"flops_s": rate, "share": rate / self._ceilings["product_flops_s"]}

    def of_transformers(self) -> None:
        """Decode on transformers, where it is installed."""
        shape, plan = self._shape, self._plan
        device = torch.device("cpu") if plan.dry else torch.device("cuda")
        model = hugging_face(shape, self._dtype, device)
        if model is None:
            self.report.note(left_out="transformers is not installed")
            return
        for batch in plan.batches:
            for context in plan.contexts:
                if batch * context * shape.kv_elements * 2 > PEER_KV_BYTES:
                    continue

                def measure(batch: int = batch, context: int = context) -> dict[str, Any]:
                    step_s = peer_decode(model, shape, batch, context, plan)
                    return {"step_s": step_s, "tokens_s": batch / statistics.median(step_s)}

                self.report.add(self._key | {"batch": batch, "context": context}, measure, 5.0)


def main() -> int:
    shapes = {shape.name: shape for shape in (LLAMA_8B, SMOLLM2)}
    given = arguments(
        __doc__, model=list(shapes), engine=["popmesh", "transformers"], form=["plain", "resident"]
    )
    measured = Measured(
        TINY if given.dry else shapes[given.model], DRY if given.dry else REAL, given
    )
    if given.engine == "popmesh":
        with_graphs = measured.of_engine()
        if not given.dry:
            gc.collect()
            torch.cuda.empty_cache()
            # Some figures are better than none.
            measured.of_engine(overlap=with_graphs, graphs=with_graphs)
    else:
        measured.of_transformers()
    return measured.report.ended()


if __name__ == "__main__":
    sys.exit(main())
