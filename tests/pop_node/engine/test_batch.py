"""The layout of a batch against the sentences that define it (``kernels.meta``)."""

from __future__ import annotations

import dataclasses
from array import array

import torch
from engine_builders import an_add
from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine.running.batch import Batch, build_batch
from pop_node.engine.running.decode_batch import DecodeBatches, decodes
from pop_node.engine.scheduling.schedule import Row, Schedule
from pop_node.engine.scheduling.sequence import Sequence

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


@given(steps=st.lists(rows(), min_size=1, max_size=4))
def test_decode_batches_equal_what_is_built_anew(steps: list[list[Row]]) -> None:
    """Steps of different sizes over the same memory leave nothing behind in each other."""
    batches = DecodeBatches(SIZE)
    for chosen in steps:
        alone = tuple(Row(row.sequence, row.start, 1) for row in chosen)
        sampled = tuple(i for i, row in enumerate(alone) if row.end == len(row.sequence.ids))
        schedule = Schedule(alone, sampled, (), len(alone))
        assert decodes(schedule)
        batch, expected = batches.build(schedule), build_batch(schedule, SIZE, torch.device("cpu"))
        assert torch.equal(batch.ids, expected.ids)
        assert torch.equal(batch.logit_rows, expected.logit_rows)
        for field in dataclasses.fields(expected.meta):
            ours, theirs = (getattr(b.meta, field.name) for b in (batch, expected))
            if isinstance(theirs, torch.Tensor):
                assert ours.dtype == theirs.dtype
                ours, theirs = ours.tolist(), theirs.tolist()
            assert ours == theirs, field.name


@given(chosen=rows(), moved=st.lists(st.integers(0, 8), max_size=12))
def test_decode_batches_that_go_on_equal_what_is_built_anew(
    chosen: list[Row], moved: list[int]
) -> None:
    """Each step of the same sequences is a token further; before it one of them may have given way
    and come back to other blocks."""
    batches = DecodeBatches(SIZE)
    sequences = [row.sequence for row in chosen]
    fresh = iter(range(64, 100_000))
    for step, mover in enumerate(moved):
        for index, sequence in enumerate(sequences):
            if index == mover:
                sequence.blocks = array("i", [next(fresh) for _ in sequence.blocks])
            sequence.ids.append(step)
            if len(sequence.ids) > len(sequence.blocks) * SIZE:
                sequence.blocks.append(next(fresh))
        alone = tuple(Row(s, len(s.ids) - 1, 1) for s in sequences)
        schedule = Schedule(alone, tuple(range(len(alone))), (), len(alone))
        batch, expected = batches.build(schedule), build_batch(schedule, SIZE, torch.device("cpu"))
        assert torch.equal(batch.ids, expected.ids)
        assert torch.equal(batch.logit_rows, expected.logit_rows)
        for name in ("positions", "slots", "context_lens", "block_tables", "query_starts"):
            assert torch.equal(getattr(batch.meta, name), getattr(expected.meta, name)), name
        assert batch.meta.context_lens_host == expected.meta.context_lens_host


def test_decode_batches_grow_and_then_keep_their_memory() -> None:
    batches = DecodeBatches(SIZE)

    def build(count: int, tokens: int) -> Batch:
        found = []
        for seq in range(count):
            sequence = Sequence.from_add(an_add(seq, prompt_ids=[7] * tokens), seq, 0.0)
            sequence.blocks = array("i", range(seq, seq + -(-tokens // SIZE)))
            found.append(Row(sequence, tokens - 1, 1))
        schedule = Schedule(tuple(found), tuple(range(count)), (), count)
        batch = batches.build(schedule)
        fresh = build_batch(schedule, SIZE, torch.device("cpu"))
        assert torch.equal(batch.meta.block_tables, fresh.meta.block_tables)
        assert torch.equal(batch.meta.slots, fresh.meta.slots)
        return batch

    build(2, 5)
    grown = build(40, 70 * SIZE)
    assert build(40, 69 * SIZE).meta.slots.data_ptr() == grown.meta.slots.data_ptr()
    assert build(3, 5).ids.data_ptr() == grown.ids.data_ptr()


def test_a_step_with_a_chunk_is_no_decode_step() -> None:
    sequence = Sequence.from_add(an_add(1, prompt_ids=[1, 2]), 1, 0.0)
    assert not decodes(Schedule((Row(sequence, 0, 2),), (0,), (), 2))
