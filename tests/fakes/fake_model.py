"""A model whose next token is a pure function of the previous ones, with an honest paged cache.

The cache keeps one value per slot: a hash of all tokens up to that position. Computing a token
reads the value before it *through the block table* and checks it, so a lost, repeated, stale or
misplaced token shows at once, and so does a prefix hit on the wrong block.
"""

from __future__ import annotations

from collections.abc import Sequence

from pop_node.engine.scheduling.schedule import NO_TOKEN, Row, Schedule

VOCABULARY = 50


def chain(ids: Sequence[int]) -> list[int]:
    """What the cache holds for each position of ``ids``."""
    values, value = [], 0
    for token in ids:
        value = (value * 1_000_003 + token + 1) % (2**61 - 1)
        values.append(value)
    return values


def answer(ids: Sequence[int], num_tokens: int, vocabulary: int = VOCABULARY) -> list[int]:
    """The next ``num_tokens`` tokens after ``ids``."""
    known = list(ids)
    for _ in range(num_tokens):
        known.append(chain(known)[-1] % vocabulary)
    return known[len(ids) :]


class FakeModel:
    """Runs schedules; ``memory[slot]`` is None where nothing was ever written.

    With a small ``vocabulary`` its texts repeat themselves often, though never for long. ``sick``
    are numbers of sequences for which it draws no token.
    """

    def __init__(self, num_blocks: int, block_tokens: int, vocabulary: int = VOCABULARY) -> None:
        self.block_tokens = block_tokens
        self.vocabulary = vocabulary
        self.memory: list[int | None] = [None] * (num_blocks * block_tokens)
        self.sick: set[int] = set()

    def slot(self, blocks: Sequence[int], position: int) -> int:
        return blocks[position // self.block_tokens] * self.block_tokens + (
            position % self.block_tokens
        )

    def write(self, blocks: Sequence[int], ids: Sequence[int], lo: int, hi: int) -> None:
        """Put the KV of positions ``[lo, hi)`` of ``ids`` in place, as an import does."""
        values = chain(ids)
        for position in range(lo, hi):
            self.memory[self.slot(blocks, position)] = values[position]

    def run(self, schedule: Schedule) -> list[int]:
        """Compute all rows, then sample; like the real runner."""
        for row in schedule.rows:
            ids, blocks = [*row.sequence.ids, *row.drafts][: row.end], row.sequence.blocks
            values = chain(ids)
            for position in range(row.start):
                found = self.memory[self.slot(blocks, position)]
                assert found == values[position], f"position {position} holds another text"
            self.write(blocks, ids, row.start, row.end)
        drawn = []
        for index in schedule.sampled:
            row = schedule.rows[index]
            values = chain([*row.sequence.ids, *row.drafts])
            drawn += [self.drawn(row, value) for value in values[-1 - len(row.drafts) :]]
        return drawn

    def drawn(self, row: Row, value: int) -> int:
        """The token after a row whose last value is this."""
        return NO_TOKEN if row.sequence.seq in self.sick else value % self.vocabulary
