"""Batches of steps in which each sequence computes one token: nearly all steps of an engine.

What ``batch`` builds anew, of any shape, is here written into memory that steps share, and where
the same sequences go on by a token each, only what changes. On two cores that takes 40 us for 16
sequences instead of 270, of a step of 9 ms.
"""

from __future__ import annotations

from array import array
from operator import is_not

import torch

from kernels.meta import AttentionMeta
from pop_node.engine.running.batch import Batch
from pop_node.engine.scheduling.schedule import Schedule

ROOM_ROWS = 16
ROOM_BLOCKS = 64
"""The memory grows by so much at a time, so that a steady load leaves it as it is: sequences of
1,024 tokens in blocks of 16. Guesses."""


def decodes(schedule: Schedule) -> bool:
    """Does each row of the step compute one token?"""
    return schedule.num_tokens == len(schedule.rows)


class DecodeBatches:
    """Builds the batches of one engine, on the CPU. Each is overwritten by the next."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        # Of the step before: contexts and slots of the rows, and the tables that were copied.
        self._ends: list[int] = []
        self._slots: list[int] = []
        self._copied: list[array[int]] = []
        self._make_room(ROOM_ROWS, ROOM_BLOCKS)

    def build(self, schedule: Schedule) -> Batch:
        """The batch of a schedule that ``decodes``; equal to that of ``batch.build_batch``."""
        rows, sampled, size = schedule.rows, schedule.sampled, self._block_tokens
        starts = [row.start for row in rows]
        ends = [start + 1 for start in starts]
        tables = [row.sequence.blocks for row in rows]
        num_rows, wide = len(rows), max(starts) // size + 1
        shape = (num_rows, len(sampled), wide)
        if (
            shape == self._shape
            and starts == self._ends
            and not any(map(is_not, tables, self._copied))
        ):
            slots = self._go_on(starts, tables)
        else:
            if num_rows > self._room[0] or wide > self._room[1]:
                self._make_room(max(num_rows, self._room[0]), max(wide, self._room[1]))
            slots = self._lay_out(starts, tables, wide)
            if shape != self._shape:
                self._cut(shape)
        self._ends, self._slots, self._copied = ends, slots, tables
        numbers, line = self._numbers, self._room[0]
        numbers[:num_rows] = array("l", [row.sequence.ids[row.start] for row in rows])
        numbers[line : line + num_rows] = array("l", starts)
        numbers[2 * line : 2 * line + num_rows] = array("l", slots)
        numbers[3 * line : 3 * line + len(sampled)] = array("l", sampled)
        self._contexts[:num_rows] = array("i", ends)
        return Batch(
            ids=self._ids,
            meta=AttentionMeta(
                *(self._positions, self._slot_of, self._query_starts, self._context_lens),
                block_tables=self._tables,
                block_tokens=size,
                max_query=1,
                max_context=max(ends),
                query_lens_host=self._query_lens,
                context_lens_host=ends,
            ),
            logit_rows=self._logit_rows,
        )

    def _lay_out(self, starts: list[int], tables: list[array[int]], wide: int) -> list[int]:
        """Copy the block tables of tokens at ``starts``; returns their slots."""
        size, line = self._block_tokens, self._room[1]
        slots = []
        for index, (start, table) in enumerate(zip(starts, tables, strict=True)):
            at, used = index * line, start // size + 1
            slots.append(table[used - 1] * size + start % size)
            self._all_tables[at : at + used] = table[:used]
            if used < wide:
                self._all_tables[at + used : at + wide] = self._zeros[: wide - used]
        return slots

    def _go_on(self, starts: list[int], tables: list[array[int]]) -> list[int]:
        """The same where each is the token after the one before, in a table that has only grown."""
        size = self._block_tokens
        slots = [slot + 1 for slot in self._slots]
        for index, start in enumerate(starts):
            if start % size == 0:
                block = tables[index][start // size]
                slots[index] = block * size
                self._all_tables[index * self._room[1] + start // size] = block
        return slots

    def _make_room(self, rows: int, blocks: int) -> None:
        rows, blocks = -(-rows // ROOM_ROWS) * ROOM_ROWS, -(-blocks // ROOM_BLOCKS) * ROOM_BLOCKS
        self._room = rows, blocks
        self._shape = (0, 0, 0)
        self._numbers = _memory(4 * rows, "l")  # ids, positions, slots, logit rows
        self._contexts = _memory(rows, "i")
        self._all_tables = _memory(rows * blocks, "i")
        self._zeros = _memory(blocks, "i")
        self._all_starts = torch.arange(rows + 1, dtype=torch.int32)

    def _cut(self, shape: tuple[int, int, int]) -> None:
        """Views of what a batch of this shape uses."""
        rows, sampled, wide = self._shape = shape
        numbers = torch.frombuffer(self._numbers, dtype=torch.int64).view(4, -1)
        self._ids, self._positions, self._slot_of = numbers[:3, :rows].unbind()
        self._logit_rows = numbers[3, :sampled]
        self._query_starts = self._all_starts[: rows + 1]
        self._context_lens = torch.frombuffer(self._contexts, dtype=torch.int32)[:rows]
        tables = torch.frombuffer(self._all_tables, dtype=torch.int32)
        self._tables = tables.view(self._room)[:rows, :wide]
        self._query_lens = [1] * rows


def _memory(count: int, kind: str) -> memoryview:
    """Zeros, as the numbers of an ``array`` of this kind."""
    return memoryview(array(kind, bytes(array(kind).itemsize * count)))
