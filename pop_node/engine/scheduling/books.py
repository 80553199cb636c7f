"""Do the books of a scheduler agree with each other? For tests and for an idle engine."""

from __future__ import annotations

from collections.abc import Collection

from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.sequence import Sequence
from pop_node.engine.scheduling.waiting import Waiting, age


def check_books(
    pool: BlockPool,
    sequences: Collection[Sequence],
    waiting: Waiting,
    running: Collection[Sequence],
    receiving: Collection[Sequence],
    num_pinned: int,
) -> None:
    """Raise ``AssertionError`` if they do not. Linear in everything."""
    pool.check(s.blocks for s in sequences)
    waiting.check()
    by_phase = {"waiting": {s.seq for s in waiting}}
    by_phase["running"] = {s.seq for s in running}
    by_phase["receiving"] = {s.seq for s in receiving}
    for sequence in sequences:
        if sequence.phase != "pinned":
            assert sequence.seq in by_phase[sequence.phase], f"{sequence.seq} is in no queue"
        holds = sequence.phase != "waiting"
        assert holds == bool(sequence.blocks), f"{sequence.phase} with {sequence.blocks}"
    ages = [age(s) for s in running]
    assert ages == sorted(ages), "running sequences are out of order"
    assert num_pinned == sum(s.phase == "pinned" for s in sequences)
