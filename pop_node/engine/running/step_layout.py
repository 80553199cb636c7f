"""A step's numbers in one flat buffer, so that one copy brings all of them to the device.

    ids | positions | slots | logit rows | sampling | query starts | context lengths | block tables

The buffer is cut by sizes alone: host and device cut theirs alike, and a graph that was captured
over the cut of its bucket finds every step there. Rows of padding behind the real ones decode one
token at position 0 of a scratch block that belongs to no sequence.

Imports no torch: the device's side is cut with its own ``view``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pop_node.engine.scheduling.schedule import Row, Schedule
from pop_node.engine.scheduling.sequence import Sequence

ALIGNMENT = 64
"""Of each part. Triton makes a kernel of its own for pointers that are not multiples of 16."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """``tokens`` T in ``rows`` S sequences, ``sampled`` rows N with ``words`` of parameters each,
    and block tables of ``width`` W blocks."""

    tokens: int
    rows: int
    sampled: int
    width: int
    words: int


class Fields(NamedTuple):
    """The parts of a cut buffer; arrays on the host, tensors on the device.

    ids, positions, slots [T]; logit_rows [N]; sampling [N, words]: int64. query_starts [S + 1],
    context_lens [S], block_tables [S, W]: int32. As in ``kernels.meta.AttentionMeta``, but an id
    below 0 is number ``-1 - id`` of the tokens that the step before sampled.
    """

    ids: Any
    positions: Any
    slots: Any
    logit_rows: Any
    sampling: Any
    query_starts: Any
    context_lens: Any
    block_tables: Any


def spans(shape: StepShape) -> tuple[list[tuple[int, int, tuple[int, ...], bool]], int]:
    """(begin, end, shape, whether int64) of each part in bytes, and the buffer's length."""
    t, s, n = shape.tokens, shape.rows, shape.sampled
    parts: list[tuple[tuple[int, ...], bool]] = [((t,), True)] * 3
    parts += [((n,), True), ((n, shape.words), True)]
    parts += [((s + 1,), False), ((s,), False), ((s, shape.width), False)]
    found, at = [], 0
    for sizes, wide in parts:
        nbytes = int(np.prod(sizes)) * (8 if wide else 4)
        found.append((at, at + nbytes, sizes, wide))
        at += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return found, at


def cut(
    buffer: Any, shape: StepShape, wide: Any, narrow: Any, reshape: Callable[..., Any]
) -> Fields:
    """Views of ``buffer``, [bytes] uint8. ``wide`` and ``narrow`` are its library's int64 and
    int32; ``reshape(view, sizes)`` shapes one."""
    parts, _ = spans(shape)
    return Fields(
        *(
            reshape(buffer[begin:end].view(wide if is_wide else narrow), sizes)
            for begin, end, sizes, is_wide in parts
        )
    )


def cut_host(buffer: NDArray[np.uint8], shape: StepShape) -> Fields:
    """``cut`` of an array."""
    return cut(buffer, shape, np.int64, np.int32, np.reshape)


def fill(
    fields: Fields,
    schedule: Schedule,
    block_tokens: int,
    scratch_block: int,
    places: Mapping[Sequence, int],
) -> None:
    """Write the rows of ``schedule``, then padding up to the size of ``fields``.

    ``places``: where in what the step before sampled a sequence's token is that is not known here.
    Sampling parameters are left to whoever knows them.
    """
    rows = schedule.rows
    count, tokens = len(rows), schedule.num_tokens
    lens = np.array([row.count for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    query_starts = fields.query_starts
    query_starts[0] = 0
    query_starts[1 : count + 1] = np.cumsum(lens)
    tables = fields.block_tables
    tables[:count] = 0
    at = 0
    for index, row in enumerate(rows):
        fields.ids[at : at + row.count] = _ids(row, places)
        width = -(-row.end // block_tokens)
        tables[index, :width] = np.frombuffer(row.sequence.blocks, dtype=np.int32, count=width)
        at += row.count
    owner = np.repeat(np.arange(count), lens)  # [T]: the row of each token
    positions = np.arange(tokens) + (starts - query_starts[:count])[owner]
    fields.positions[:tokens] = positions
    blocks = tables[owner, positions // block_tokens].astype(np.int64)
    fields.slots[:tokens] = blocks * block_tokens + positions % block_tokens
    fields.context_lens[:count] = starts + lens
    fields.logit_rows[: len(schedule.sampled)] = query_starts[1:][list(schedule.sampled)] - 1
    # Padding: each row has one token, so rows and tokens are padded by as many.
    fields.ids[tokens:] = 0
    fields.positions[tokens:] = 0
    fields.slots[tokens:] = scratch_block * block_tokens
    fields.logit_rows[len(schedule.sampled) :] = tokens
    query_starts[count + 1 :] = np.arange(tokens + 1, tokens + len(query_starts) - count)
    fields.context_lens[count:] = 1
    tables[count:] = scratch_block


def _ids(row: Row, places: Mapping[Sequence, int]) -> Any:
    if row.start < len(row.sequence.ids):
        return np.frombuffer(row.sequence.ids[row.start : row.end], dtype=np.int32)
    return -1 - places[row.sequence]
