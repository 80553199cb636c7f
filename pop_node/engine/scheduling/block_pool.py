"""The blocks of the paged KV cache: who holds which, and which beginnings can be reused.

Pure bookkeeping over block numbers; the memory itself is the model's. A block is *free* (nobody
needs what it holds), *cached* (nobody holds it, but its hash is known and may be hit) or *held*
(one or more block tables name it). At every moment free + held + cached = all blocks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """A fixed number of blocks with reference counts, generations and hashed prefix reuse.

    ``generations[b]`` grows each time block ``b`` is handed out with new contents, so a copy that
    is late can tell that its block now belongs to someone else.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_tokens} tokens")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.generations = [0] * num_blocks
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds but that can still be hit."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that can be allocated now: free ones and, at the price of their contents,
        cached."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens need."""
        return -(-tokens // self.block_tokens)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known beginning of a hash chain. Takes no reference."""
        hits: list[int] = []
        for value in hashes:
            block = self._by_hash.get(value)
            if block is None:
                break
            hits.append(block)
        return hits

    def unheld(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` acquiring would take out of ``available``."""
        references = self._references
        return sum(1 for block in blocks if references[block] == 0)

    def acquire(self, hits: Iterable[int]) -> None:
        """Hold blocks found by ``match``."""
        for block in hits:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Hold ``count`` blocks with no contents, evicting the least recently used cached ones.

        Raises ``ValueError`` beyond ``available``: the caller decides who gives way.
        """
        if count > self.available:
            raise ValueError(f"{count} blocks wanted, {self.available} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._by_hash[self._hash_of.pop(block)]
            self._references[block] = 1
            self.generations[block] += 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a table.

        The end of a table is given back first, so that it is also evicted first: a beginning is of
        use without its end, but not the reverse.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def register(self, block: int, value: bytes) -> None:
        """Make a held, full and computed block known by its chained hash.

        When another block already carries the same hash, this one stays private.
        """
        assert self._references[block] > 0, f"block {block} registered while nobody holds it"
        if value not in self._by_hash and block not in self._hash_of:
            self._by_hash[value] = block
            self._hash_of[block] = value

    def unregister(self, hashes: Iterable[bytes]) -> None:
        """Nobody hits these any more; who holds their blocks keeps them."""
        for value in hashes:
            block = self._by_hash.pop(value, None)
            if block is None:
                continue
            del self._hash_of[block]
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def forget(self) -> None:
        """Drop all knowledge of contents; cached blocks become free."""
        self._by_hash.clear()
        self._hash_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the books with the block tables that should exist.

        Raises ``AssertionError`` naming the first disagreement. Linear in all blocks: for tests and
        for an idle engine.
        """
        held = Counter(block for table in tables for block in table)
        for block, references in enumerate(self._references):
            assert references == held[block], f"block {block}: {references} held as {held[block]}"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is free and cached"
        assert not (free | cached) & held.keys(), "a held block can be allocated"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "blocks are lost"
        assert cached <= self._hash_of.keys(), "a cached block has no hash"
        assert not free & self._hash_of.keys(), "a free block can be hit"
        assert {v: b for b, v in self._hash_of.items()} == self._by_hash, "hashes disagree"
