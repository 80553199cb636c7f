"""Short ways to say what the engine tests need."""

from __future__ import annotations

from typing import Any

from pop_node.engine.messages import Add
from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.scheduler import Scheduler
from pop_node.engine.scheduling.speculation import Speculation
from pop_node.engine.scheduling.validate import Limits
from tests.fakes.fake_model import VOCABULARY


def an_add(seq: int = 1, **changes: Any) -> Add:
    """A valid greedy Add of ten prompt tokens, with a transfer id where its leg needs one."""
    values: dict[str, Any] = {
        "leg": "both",
        "prompt_ids": list(range(10)),
        "forced_ids": [],
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 7,
        "stop_ids": [],
        "salt": b"tenant",
    } | changes
    transfer = b"" if values["leg"] == "both" else seq.to_bytes(16, "little")
    return Add(seq=seq, **({"transfer": transfer} | values))


def a_scheduler(
    num_blocks: int = 64,
    block_tokens: int = 4,
    *,
    token_budget: int = 16,
    max_sequences: int = 8,
    max_waiting: int = 16,
    context_tokens: int = 10_000,
    speculation: Speculation | None = None,
) -> tuple[Scheduler, BlockPool]:
    """A scheduler for the fake model, with its pool."""
    pool = BlockPool(num_blocks, block_tokens)
    limits = Limits(VOCABULARY, context_tokens, block_tokens, num_blocks)
    scheduler = Scheduler(
        pool,
        limits,
        token_budget=token_budget,
        max_sequences=max_sequences,
        max_waiting=max_waiting,
        speculation=speculation,
    )
    return scheduler, pool
