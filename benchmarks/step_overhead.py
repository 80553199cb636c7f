"""What an engine step costs beside the model: scheduling, layout, drawing, telling the agent.

    python benchmarks/step_overhead.py --store .cache/store-2 --out STEP_OVERHEAD.json

The engine's own loop runs without its process, in decode steps at 1, 4 and 16 sequences without
guesses, over a real socket that is read by a thread. CPU time of the loop's thread, which stands
still while others have the processor: of whole steps, of the forward pass and of drawing in them.
``overhead_us`` is what is left: Python, numpy and the socket. ``overhead_share`` is its part of a
step that lasts as long as ``step_ms``, the quickest tenth by the clock.
"""

from __future__ import annotations

import gc
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common.report import command_line, facts, save

from pop_node.engine.loop import EngineLoop
from pop_node.engine.messages import Add
from pop_node.engine.port import Port
from pop_node.engine.running.runner import Runner
from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.scheduler import Scheduler
from pop_node.engine.scheduling.validate import Limits
from pop_node.engine.staging.kv_mover import HostMover
from pop_node.engine.staging.stager import Stager
from pop_node.kv_stream.staging import Staging, StagingLayout
from pop_node.models.registry import load_backend, load_model
from pop_node.store.store import Store

BATCHES = (1, 4, 16)
PROMPT_TOKENS = 64
STEPS = 150
BLOCKS, BLOCK_TOKENS = 512, 16
RECEIVE_BYTES = 1 << 16


class Timed:
    """Adds up the thread's CPU time within calls of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.spent_s = 0.0

    def __call__(self, *arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return self._function(*arguments)
        finally:
            self.spent_s += time.thread_time() - began


def an_add(seq: int) -> Add:
    """A request that decodes to the end, greedily."""
    return Add(
        seq=seq,
        leg="both",
        prompt_ids=[100 + (seq * 7919 + i * 31) % 40000 for i in range(PROMPT_TOKENS)],
        forced_ids=[],
        max_tokens=STEPS + 1,
        temperature=0.0,
        top_p=1.0,
        seed=0,
        stop_ids=[],
        salt=b"",
        transfer=b"",
    )


def drain(sock: socket.socket) -> None:
    """Be the agent: read and forget."""
    while sock.recv(RECEIVE_BYTES):
        pass


def measure(model: Any, ops: Any, batch: int) -> dict[str, float]:
    """Figures of ``STEPS`` decode steps with ``batch`` sequences."""
    pool = BlockPool(BLOCKS, BLOCK_TOKENS)
    limits = Limits(model.config.vocab_size, BLOCKS * BLOCK_TOKENS, BLOCK_TOKENS, BLOCKS)
    scheduler = Scheduler(
        pool, limits, token_budget=2048, max_sequences=64, max_waiting=64, speculation=None
    )
    runner = Runner(model, ops, BLOCKS, BLOCK_TOKENS)
    ours, theirs = socket.socketpair()
    reader = threading.Thread(target=drain, args=(theirs,))
    reader.start()
    port = Port(ours)
    spec = model.kv_spec()
    staging = Staging.create(StagingLayout(export_slots=1, import_slots=1))
    stager = Stager(
        spec, runner.cache, BLOCK_TOKENS, staging, pool.generations, port.wake, HostMover()
    )
    loop = EngineLoop(scheduler, runner, stager, port, model.config.layers - 1)
    forward, draw = Timed(model.forward), Timed(runner._sampler.draw)
    model.forward, runner._sampler.draw = forward, draw
    try:
        for seq in range(batch):
            scheduler.handle(an_add(seq), 0.0)
        loop.step()  # the prompts
        forward.spent_s = draw.spent_s = 0.0
        walls = []
        began = time.thread_time()
        for _ in range(STEPS):
            at = time.perf_counter()
            loop.step()
            walls.append(time.perf_counter() - at)
        spent_s = time.thread_time() - began
    finally:
        del model.forward
        ours.close()
        reader.join()
        theirs.close()
    overhead_s = (spent_s - forward.spent_s - draw.spent_s) / STEPS
    step_s = sorted(walls)[STEPS // 10]
    return {
        "step_ms": round(step_s * 1e3, 3),
        "forward_us": round(forward.spent_s / STEPS * 1e6, 1),
        "draw_us": round(draw.spent_s / STEPS * 1e6, 1),
        "overhead_us": round(overhead_s * 1e6, 1),
        "overhead_share": round(overhead_s / step_s, 4),
    }


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="store that holds smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    bundle = Store(args.store).get("smollm2-135m").path
    report = facts(__doc__, ["torch", "numpy"])
    for threads in args.threads:
        ops = load_backend("auto", threads)
        model = load_model(bundle, "bfloat16", ops)
        measure(model, ops, 1)  # the first touch of everything
        gc.collect()
        for batch in BATCHES:
            figures = measure(model, ops, batch)
            report.setdefault("figures", {})[f"{threads} threads, batch {batch}"] = figures
            print(threads, batch, figures, flush=True)
    save(report, args.out)


if __name__ == "__main__":
    main()
