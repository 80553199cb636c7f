"""The layout of a batch against the sentences that define it (``kernels.meta``)."""

from __future__ import annotations

from array import array

import torch
from engine_builders import an_add
from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine.batch import build_batch
from pop_node.engine.schedule import Row, Schedule
from pop_node.engine.sequence import Sequence

SIZE = 4


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """Sequences with shuffled, disjoint block tables, each with a chunk of one token or more."""
    chosen = []
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    numbers = iter(draw(st.permutations(range(64))))
    for seq, length in enumerate(lengths):
        ids = draw(st.lists(st.integers(0, 49), min_size=length, max_size=length))
        sequence = Sequence.from_add(an_add(seq, prompt_ids=ids), seq, 0.0)
        sequence.blocks = array("i", [next(numbers) for _ in range(-(-length // SIZE))])
        start = draw(st.integers(0, length - 1))
        chosen.append(Row(sequence, start, draw(st.integers(1, length - start))))
    return chosen


@given(rows=rows())
def test_every_token_is_where_the_block_table_says(rows: list[Row]) -> None:
    sampled = tuple(i for i, row in enumerate(rows) if row.end == len(row.sequence.ids))
    num_tokens = sum(row.count for row in rows)
    schedule = Schedule(tuple(rows), sampled, (), num_tokens)
    batch = build_batch(schedule, SIZE, torch.device("cpu"))
    meta = batch.meta
    at = 0
    for i, row in enumerate(rows):
        assert meta.query_starts[i] == at
        assert meta.context_lens[i] == row.end
        for position in range(row.start, row.end):
            assert batch.ids[at] == row.sequence.ids[position]
            assert meta.positions[at] == position
            block = row.sequence.blocks[position // SIZE]
            assert meta.slots[at] == block * SIZE + position % SIZE
            assert meta.block_tables[i, position // SIZE] == block
            at += 1
        used = -(-row.end // SIZE)
        assert not meta.block_tables[i, used:].any()
    assert meta.query_starts[-1] == at == num_tokens
    ends = [int(meta.query_starts[i + 1]) - 1 for i in sampled]
    assert batch.logit_rows.tolist() == ends
    assert meta.query_lens_host == [row.count for row in rows]
    assert meta.context_lens_host == [row.end for row in rows]
    assert meta.max_query == max(meta.query_lens_host)
    assert meta.max_context == max(meta.context_lens_host)
    assert batch.ids.dtype == meta.positions.dtype == meta.slots.dtype == torch.int64
    assert meta.query_starts.dtype == meta.block_tables.dtype == torch.int32
