"""The engine of ``kv_codec.py`` beside whose running streams hand-overs are made.

    python benchmarks/parts/kv_codec_streams.py STORE THREADS STREAMS

SmolLM2-135M decodes so many streams without a pause, each new one taking the place of one that has
ended. For each line on stdin it answers one JSON line on stdout: the milliseconds of the steps
since the line before, without those that computed a prompt.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from pathlib import Path

from pop_node.engine.messages import Add
from pop_node.engine.running.runner import Runner
from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.scheduler import Scheduler
from pop_node.engine.scheduling.validate import Limits
from pop_node.models.registry import load_backend, load_model
from pop_node.store.store import Store

PROMPT_TOKENS, ANSWER_TOKENS, BLOCKS, BLOCK_TOKENS = 64, 400, 512, 16


def an_add(seq: int) -> Add:
    """A request that decodes to the end, greedily."""
    ids = [100 + (seq * 7919 + i * 31) % 40000 for i in range(PROMPT_TOKENS)]
    return Add(seq, "both", ids, [], ANSWER_TOKENS, 0.0, 1.0, 0, [], b"", b"")


def decode(store: Path, threads: int, streams: int, steps_ms: list[float]) -> None:
    """Never ends."""
    directory = Store(store).get("smollm2-135m").path.resolve()
    ops = load_backend("native", threads)
    model = load_model(directory, "bfloat16", ops)
    runner = Runner(model, ops, BLOCKS, BLOCK_TOKENS)
    limits = Limits(model.config.vocab_size, BLOCKS * BLOCK_TOKENS, BLOCK_TOKENS, BLOCKS)
    scheduler = Scheduler(
        BlockPool(BLOCKS, BLOCK_TOKENS), limits, token_budget=512, max_sequences=streams,
        max_waiting=streams, speculation=None,
    )  # fmt: skip
    for seq in itertools.count():
        while scheduler.num_sequences == streams:
            began = time.perf_counter()
            schedule, _ = scheduler.schedule(0.0)
            scheduler.complete(schedule, runner.run(schedule, None), 0.0)
            if all(row.count == 1 for row in schedule.rows):
                steps_ms.append((time.perf_counter() - began) * 1e3)
        scheduler.handle(an_add(seq), 0.0)


def main(store: str, threads: str, streams: str) -> None:
    """Decode in a thread, answer in this one."""
    steps_ms: list[float] = []
    work = threading.Thread(
        target=decode, args=(Path(store), int(threads), int(streams), steps_ms), daemon=True
    )
    work.start()
    while len(steps_ms) < ANSWER_TOKENS // 4:
        time.sleep(0.05)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        found, steps_ms[:] = list(steps_ms), []
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
