"""What a sequence holds of the pool: how its block table grows, is made known, and is given back.

Pure; decides nothing: the scheduler says who may have how many blocks.
"""

from __future__ import annotations

from pop_node.engine.scheduling.block_pool import BlockPool
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
    del sequence.blocks[:]
    sequence.computed = sequence.registered = 0


def register_full(pool: BlockPool, sequence: Sequence) -> None:
    """Make blocks that were filled by now known to later prompts."""
    full = sequence.computed // pool.block_tokens
    if full > sequence.registered:
        hashes = sequence.hashes(full, pool.block_tokens)
        for index in range(sequence.registered, full):
            pool.register(sequence.blocks[index], hashes[index])
        sequence.registered = full
