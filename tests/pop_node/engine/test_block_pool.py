"""The block pool against its own books, under random use."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pop_node.engine.scheduling.block_pool import BlockPool

BLOCKS = 7


def test_eviction_takes_the_oldest_and_the_end_of_a_table_first() -> None:
    pool = BlockPool(4, 16)
    old, young = pool.allocate(2), pool.allocate(2)
    for block, value in zip(old + young, (b"o0", b"o1", b"y0", b"y1"), strict=True):
        pool.register(block, value)
    pool.release(old)
    pool.release(young)
    pool.allocate(1)
    assert pool.match([b"o0", b"o1"]) == old[:1]
    pool.allocate(2)
    assert pool.match([b"o0"]) == []
    assert pool.match([b"y0", b"y1"]) == young[:1]


def test_a_hit_shares_the_block_and_its_contents_survive_until_both_let_go() -> None:
    pool = BlockPool(2, 16)
    table = pool.allocate(1)
    pool.register(table[0], b"v")
    hits = pool.match([b"v", b"unknown"])
    assert hits == table
    pool.acquire(hits)
    pool.release(table)
    assert (pool.free, pool.cached) == (1, 0)
    pool.release(hits)
    assert (pool.free, pool.cached) == (1, 1)


def test_a_generation_changes_exactly_when_contents_may() -> None:
    pool = BlockPool(1, 16)
    (block,) = pool.allocate(1)
    first = pool.generations[block]
    pool.register(block, b"v")
    pool.release([block])
    pool.acquire(pool.match([b"v"]))
    assert pool.generations[block] == first
    pool.release([block])
    pool.allocate(1)
    assert pool.generations[block] != first
    assert pool.match([b"v"]) == []


def test_too_many_blocks_are_refused_and_nothing_changes() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(ValueError, match="3 blocks wanted"):
        pool.allocate(3)
    pool.check([])


def test_forget_turns_cached_into_free_and_keeps_held() -> None:
    pool = BlockPool(3, 16)
    table = pool.allocate(2)
    pool.register(table[0], b"a")
    pool.register(table[1], b"b")
    pool.release(table[1:])
    pool.forget()
    assert (pool.free, pool.cached, pool.match([b"a"])) == (2, 0, [])
    pool.check([table[:1]])
    pool.release(table[:1])
    pool.check([])


class Pool(RuleBasedStateMachine):
    """Tables over a pool of seven blocks; values are (table contents so far), as chained hashes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, 16)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}

    @rule(texts=st.lists(st.sampled_from([b"x", b"y"]), min_size=1, max_size=4))
    def hold(self, texts: list[bytes]) -> None:
        values = [b"".join(texts[: i + 1]) for i in range(len(texts))]
        hits = self.pool.match(values)
        assert [self.contents[block] for block in hits] == values[: len(hits)]
        new = len(values) - len(hits)
        if new + self.pool.unheld(hits) > self.pool.available:
            return
        self.pool.acquire(hits)
        table = hits + self.pool.allocate(new)
        for block, value in list(zip(table, values, strict=True))[len(hits) :]:
            self.contents[block] = value
            self.pool.register(block, value)
        self.tables.append(table)

    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        if self.tables:
            at = data.draw(st.integers(0, len(self.tables) - 1))
            self.pool.release(self.tables.pop(at))

    @invariant()
    def books_agree(self) -> None:
        self.pool.check(self.tables)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
