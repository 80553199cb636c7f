"""A step's flat buffer, padded or not, says the same as the batch that the host would build."""

from __future__ import annotations

from array import array

import numpy as np
import torch
from engine_builders import an_add
from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine.running.batch import build_batch
from pop_node.engine.running.step_layout import (
    ALIGNMENT,
    Fields,
    StepShape,
    cut,
    cut_host,
    fill,
    spans,
)
from pop_node.engine.scheduling.schedule import Row, Schedule
from pop_node.engine.scheduling.sequence import Sequence

SIZE, BLOCKS, WORDS = 4, 64, 3


@st.composite
def schedules(draw: st.DrawFn, *, decode: bool = False) -> Schedule:
    """Sequences with shuffled, disjoint block tables, each with a chunk of one token or more."""
    rows = []
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    numbers = iter(draw(st.permutations(range(BLOCKS))))
    for seq, length in enumerate(lengths):
        ids = draw(st.lists(st.integers(0, 49), min_size=length, max_size=length))
        sequence = Sequence.from_add(an_add(seq, prompt_ids=ids), seq, 0.0)
        sequence.blocks = array("i", [next(numbers) for _ in range(-(-length // SIZE))])
        start = length - 1 if decode else draw(st.integers(0, length - 1))
        rows.append(Row(sequence, start, draw(st.integers(1, length - start))))
    sampled = tuple(i for i, row in enumerate(rows) if row.end == len(row.sequence.ids))
    return Schedule(tuple(rows), sampled, (), sum(row.count for row in rows))


def shape_of(schedule: Schedule, padding: int, width: int) -> StepShape:
    rows = len(schedule.rows)
    sampled = len(schedule.sampled) + padding
    return StepShape(schedule.num_tokens + padding, rows + padding, sampled, width, WORDS)


def filled(schedule: Schedule, shape: StepShape, places: dict[Sequence, int]) -> Fields:
    """As the device sees it, out of memory with something else in it."""
    _, nbytes = spans(shape)
    host = np.full(nbytes, 0xC3, np.uint8)
    fill(cut_host(host, shape), schedule, SIZE, BLOCKS, places)
    return cut(torch.from_numpy(host), shape, torch.int64, torch.int32, torch.Tensor.view)


@given(schedule=schedules(), padding=st.integers(0, 5), wider=st.integers(0, 3))
def test_it_says_what_the_batch_says_and_padding_stays_in_the_scratch_block(
    schedule: Schedule, padding: int, wider: int
) -> None:
    batch = build_batch(schedule, SIZE, torch.device("cpu"))
    meta, width = batch.meta, batch.meta.block_tables.shape[1]
    fields = filled(schedule, shape_of(schedule, padding, width + wider), {})
    tokens, rows, sampled = schedule.num_tokens, len(schedule.rows), len(schedule.sampled)
    assert torch.equal(fields.ids[:tokens], batch.ids)
    assert torch.equal(fields.positions[:tokens], meta.positions)
    assert torch.equal(fields.slots[:tokens], meta.slots)
    assert torch.equal(fields.logit_rows[:sampled], batch.logit_rows)
    assert torch.equal(fields.query_starts[: rows + 1], meta.query_starts)
    assert torch.equal(fields.context_lens[:rows], meta.context_lens)
    assert torch.equal(fields.block_tables[:rows, :width], meta.block_tables)
    assert not fields.block_tables[:rows, width:].any()
    # Each row of padding is one token, at position 0 of the scratch block.
    assert fields.slots[tokens:].tolist() == [BLOCKS * SIZE] * padding
    assert fields.ids[tokens:].tolist() == fields.positions[tokens:].tolist() == [0] * padding
    assert fields.query_starts[rows:].tolist() == list(range(tokens, tokens + padding + 1))
    assert fields.context_lens[rows:].tolist() == [1] * padding
    assert (fields.block_tables[rows:] == BLOCKS).all()
    assert all(row < tokens + padding for row in fields.logit_rows.tolist())
    assert fields.sampling.shape == (sampled + padding, WORDS)
    for wide, field in zip([True] * 5 + [False] * 3, fields, strict=True):
        assert field.dtype == (torch.int64 if wide else torch.int32)


@given(schedule=schedules(decode=True), data=st.data())
def test_a_token_that_is_not_known_yet_is_named_by_its_place(
    schedule: Schedule, data: st.DataObject
) -> None:
    rows = list(schedule.rows)
    late = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    places = dict(zip((r.sequence for r in rows), range(7, 7 + len(rows)), strict=True))
    known = [row.sequence.ids[-1] for row in rows]
    for row, is_late in zip(rows, late, strict=True):
        if is_late:
            row.sequence.ids.pop()
    fields = filled(schedule, shape_of(schedule, 0, 8), places)
    expected = [
        -1 - places[row.sequence] if is_late else token
        for row, is_late, token in zip(rows, late, known, strict=True)
    ]
    assert fields.ids.tolist() == expected


@given(
    sizes=st.tuples(
        st.integers(0, 40), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.just(5)
    )
)
def test_parts_lie_behind_each_other_on_aligned_places(sizes: tuple[int, ...]) -> None:
    parts, nbytes = spans(StepShape(*sizes))
    end = 0
    for begin, stop, shape, wide in parts:
        assert begin % ALIGNMENT == 0
        assert begin >= end
        assert stop - begin == int(np.prod(shape)) * (8 if wide else 4)
        end = stop
    assert end <= nbytes < end + ALIGNMENT
