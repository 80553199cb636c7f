"""A long prompt beside running answers: it comes in chunks, and all get a token in each step."""

from __future__ import annotations

from itertools import pairwise

import torch
from engine_builders import an_add
from hypothesis import given, settings
from hypothesis import strategies as st
from stepped_engine import Engine

from pop_node.engine.running.batch import build_batch
from pop_node.engine.scheduling.schedule import Row, Schedule
from pop_node.engine.scheduling.sequence import Sequence


@settings(max_examples=40, deadline=None)
@given(
    budget=st.integers(4, 40),
    streams=st.integers(1, 4),
    prompt=st.integers(50, 400),
)
def test_every_stream_goes_on_in_every_step_of_a_long_prompt(
    budget: int, streams: int, prompt: int
) -> None:
    engine = Engine(num_blocks=640, token_budget=budget, max_sequences=min(8, budget))
    for seq in range(1, streams + 1):
        engine.tell(an_add(seq, prompt_ids=[seq], max_tokens=450, salt=b"%d" % seq))
    while len(engine.tokens(streams)) == 0:
        engine.step()
    long = 99
    engine.tell(an_add(long, prompt_ids=[7] * prompt, max_tokens=1))
    steps = left = 0
    while not engine.tokens(long):
        done = engine.step()
        steps += 1
        chunk = done.pop(long, 0)
        left += chunk
        if budget > streams:
            assert chunk == min(budget - streams, prompt - (left - chunk))
        assert done == {seq: 1 for seq in range(1, streams + 1)}
        assert steps <= prompt, "the prompt does not come on"
        if budget == streams:
            return  # it waits for a seat in the budget; nobody stalls
    assert left == prompt
    assert steps == -(-prompt // (budget - streams))


def test_the_numbers_of_a_step_grow_with_the_context_and_no_faster() -> None:
    """All tensors of a chunk's batch: a table entry per block of the context, and what each token
    of the chunk needs."""

    def nbytes(context: int, chunk: int) -> int:
        sequence = Sequence.from_add(an_add(prompt_ids=[1] * context), 0, 0.0)
        sequence.blocks.extend(range(-(-context // 16)))
        row = Row(sequence, context - chunk, chunk)
        batch = build_batch(Schedule((row,), (0,), (), chunk), 16, torch.device("cpu"))
        meta = batch.meta
        tensors = [batch.ids, batch.logit_rows, meta.positions, meta.slots, meta.block_tables]
        return sum(tensor.nbytes for tensor in (*tensors, meta.query_starts, meta.context_lens))

    for chunk in (1, 512):
        sizes = [nbytes(context, chunk) for context in (1024, 2048, 4096, 8192)]
        growth = [high - low for low, high in pairwise(sizes)]
        assert growth == [4 * 1024 // 16, 4 * 2048 // 16, 4 * 4096 // 16]
