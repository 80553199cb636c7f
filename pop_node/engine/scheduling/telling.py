"""What the shell is told when a sequence gets its blocks and when it ends. Pure."""

from __future__ import annotations

from pop_node.engine.messages import Allocated, Declined, Ended
from pop_node.engine.scheduling.schedule import Effect, Side, TransferBound, TransferClosed
from pop_node.engine.scheduling.sequence import Sequence


def held(sequence: Sequence, cached_tokens: int, *, is_new: bool) -> list[Effect]:
    """It holds the blocks of all given tokens, of which so many are in them already. One that is
    not ``is_new`` was announced before."""
    effects: list[Effect] = []
    if sequence.leg == "prefill" or sequence.kv_source == "transfer":
        side: Side = "export" if sequence.leg == "prefill" else "import"
        blocks, total = tuple(sequence.blocks), sequence.given_tokens
        effects.append(TransferBound(side, sequence.transfer, blocks, cached_tokens, total))
    # After the binding: once it is told, pieces may arrive beside the main loop.
    if is_new:
        effects.append(Allocated(sequence.seq, cached_tokens))
    return effects


def gone(sequence: Sequence, last: Declined | None) -> list[Effect]:
    """It holds nothing any more; ``last`` is said of it, ``Ended`` if there is nothing to say."""
    effects: list[Effect] = []
    if sequence.leg == "prefill":
        effects.append(TransferClosed("export", sequence.transfer))
    elif sequence.kv_source == "transfer":
        effects.append(TransferClosed("import", sequence.transfer))
    effects.append(last or Ended(sequence.seq))
    return effects
