"""What the scheduler says: the work of one step, and effects for the shell to carry out.

Values only; imports neither torch nor the scheduler.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pop_node.engine.messages import Allocated, Declined, Ended, Token
from pop_node.engine.scheduling.sequence import Sequence

Side = Literal["export", "import"]

NO_TOKEN = -1
"""What a runner gives in place of a token where logits have a NaN or no finite maximum, as the
operation that draws does (``kernels.reference.sampling``)."""


class Row(NamedTuple):
    """Compute tokens ``[start, start + count)`` of a sequence; earlier ones are in its blocks.

    The last of them may be ``drafts``: guesses of what follows the known tokens. Their KV goes
    where that of the right ones would; what is wrong of it is written again before it is read.
    """

    sequence: Sequence
    start: int
    count: int  # type: ignore[assignment]  # of tokens; nobody looks for fields of a row
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """First token position after the row."""
        return self.start + self.count

    def tokens(self) -> array[int]:
        """Ids of the row, ``count`` of them."""
        ids = self.sequence.ids[self.start : self.end]
        ids.extend(self.drafts)
        return ids


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step. ``sampled`` are indices of rows that reach the end of their sequence, in order: a
    token is drawn after the last known one and after each draft. ``completing`` are sequences whose
    given tokens are all computed once the step is done."""

    rows: tuple[Row, ...]
    sampled: tuple[int, ...]
    completing: tuple[Sequence, ...]
    num_tokens: int
    num_drafts: int = 0

    @classmethod
    def of(cls, rows: list[Row]) -> Schedule:
        """The step that computes ``rows``."""
        sampled: list[int] = []
        completing: list[Sequence] = []
        num_tokens = num_drafts = 0
        for index, (sequence, start, count, drafts) in enumerate(rows):
            num_tokens += count
            num_drafts += len(drafts)
            if start + count >= len(sequence.ids):
                sampled.append(index)
                is_prefill = sequence.timings.computed_at is None and sequence.leg != "decode"
                if is_prefill and start < sequence.given_tokens:
                    completing.append(sequence)
        return cls(tuple(rows), tuple(sampled), tuple(completing), num_tokens, num_drafts)

    @property
    def num_drawn(self) -> int:
        """Tokens to draw."""
        return len(self.sampled) + self.num_drafts

    @property
    def awaited(self) -> bool:
        """Do its tokens have to be told before the next step is scheduled? Penalties count them."""
        return any(self.rows[index].sequence.tally is not None for index in self.sampled)

    @property
    def prefill_tokens(self) -> int:
        """Tokens besides those that are drawn after; 0: a step that only decodes."""
        return self.num_tokens - self.num_drawn


@dataclass(frozen=True, slots=True)
class TransferOpened:
    """A prefill leg was queued: a grant for ``transfer`` may come from now on."""

    transfer: bytes
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TransferBound:
    """Blocks now stand behind a transfer; ``held_tokens`` of its ``total_tokens`` are in them
    already."""

    side: Side
    transfer: bytes
    blocks: tuple[int, ...]
    held_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TransferUnbound:
    """A prefill leg lost its blocks by preemption; the transfer goes on when it is bound again."""

    transfer: bytes


@dataclass(frozen=True, slots=True)
class TransferRenamed:
    """A prefill leg's transfer goes on as ``new_transfer``, from its beginning."""

    transfer: bytes
    new_transfer: bytes


@dataclass(frozen=True, slots=True)
class TransferClosed:
    """No copy for this transfer may touch blocks any more."""

    side: Side
    transfer: bytes


Effect = (
    Allocated
    | Declined
    | Ended
    | Token
    | TransferOpened
    | TransferBound
    | TransferUnbound
    | TransferRenamed
    | TransferClosed
)


class Load(NamedTuple):
    """How busy the scheduler is; fields as in ``messages.StepDone``."""

    queued_prefill_tokens: int
    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    pinned: int
    drafted: int = 0
    accepted: int = 0
