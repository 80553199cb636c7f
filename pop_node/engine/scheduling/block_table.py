"""What a sequence holds of the pool: how its block table grows, is made known, and is given back.

Pure; decides nothing: the scheduler says who may have how many blocks.
"""

from __future__ import annotations

from array import array

from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.schedule import Row
from pop_node.engine.scheduling.sequence import Sequence


def fit(pool: BlockPool, sequence: Sequence) -> tuple[list[int], int]:
    """(blocks of the cached beginning, how many new ones are needed besides).

    A sequence that computes leaves at least its last token to compute, for the logits.
    """
    known = len(sequence.ids)
    usable = known if sequence.kv_source == "transfer" else known - 1
    hits = pool.match(sequence.hashes(usable // pool.block_tokens, pool.block_tokens))
    return hits, pool.blocks_for(known) - len(hits)


def hold(pool: BlockPool, sequence: Sequence, hits: list[int], new: int) -> int:
    """Take what ``fit`` found; the tokens whose KV is there already."""
    pool.acquire(hits)
    sequence.blocks.extend(hits)
    sequence.blocks.extend(pool.allocate(new))
    sequence.computed = len(hits) * pool.block_tokens
    sequence.registered = len(hits)
    return sequence.computed


def give_back(pool: BlockPool, sequence: Sequence) -> None:
    """Let go of all blocks; what was registered may still be hit."""
    pool.release(sequence.blocks)
    sequence.blocks = array("i")  # a new table, by which others know that theirs is old
    sequence.computed = sequence.registered = 0


def register_full(pool: BlockPool, sequence: Sequence) -> None:
    """Make blocks that were filled by now known to later prompts."""
    full = sequence.computed // pool.block_tokens
    if full > sequence.registered:
        hashes = sequence.hashes(full, pool.block_tokens)
        for index in range(sequence.registered, full):
            pool.register(sequence.blocks[index], hashes[index])
        sequence.registered = full


def unregister(pool: BlockPool, sequence: Sequence) -> None:
    """Nobody shall hit what stands for its tokens any more: it may be broken."""
    full = len(sequence.ids) // pool.block_tokens
    pool.unregister(sequence.hashes(full, pool.block_tokens))


def lengthened(pool: BlockPool, row: Row, drafts: tuple[int, ...], num_running: int) -> Row:
    """A decode row with as many of its drafts as there are blocks for: nobody gives way to a guess,
    and a block stays for each of the ``num_running`` sequences."""
    sequence = row.sequence
    missing = pool.blocks_for(row.end + len(drafts)) - len(sequence.blocks)
    if missing > 0 and missing + num_running > pool.available:
        drafts = drafts[: len(sequence.blocks) * pool.block_tokens - row.end]
    elif missing > 0:
        sequence.blocks.extend(pool.allocate(missing))
    return Row(sequence, row.start, 1 + len(drafts), drafts)
