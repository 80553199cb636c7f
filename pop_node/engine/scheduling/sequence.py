"""One sequence inside the engine: its tokens, how far they are computed, and the blocks it holds.

Plain state that the scheduler moves from phase to phase; it decides nothing by itself.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import Literal

from pop_node.engine.messages import Add, Leg
from pop_node.engine.scheduling.drafter import Drafter
from pop_node.engine.scheduling.tally import NO_PENALTIES, Tally

Phase = Literal["waiting", "receiving", "running", "pinned", "ended"]
"""waiting: queued, holds nothing. receiving: a decode leg whose blocks wait for their KV. running:
takes part in steps. pinned: a prefill leg that is done and keeps its blocks for the transfer.
ended: gone."""

HASH_BYTES = 16
"""128 bits: a collision would show one prompt another one's KV, so it must not happen."""


@dataclass(slots=True)
class Timings:
    """Moments on the engine's clock, seconds; None until they happen."""

    added_at: float
    started_at: float | None = None
    computed_at: float | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A leg of a request. ``ids`` holds the prompt and every output token known so far.

    ``computed`` tokens have their KV in ``blocks``, the block table. ``kv_source`` says where the
    KV of the given tokens comes from: a decode leg's from its transfer until ``Commit``, else from
    computing. ``pending``: 1 while a token is drawn that nobody has been told yet (``ahead``).
    ``emitted_from`` is the output index of the first token that was not given to us. ``drafter``
    guesses what comes next, once it was asked to; ``tally`` is there for penalties.
    """

    seq: int
    leg: Leg
    arrival: int
    prompt_tokens: int
    emitted_from: int
    ids: array[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_ids: frozenset[int]
    transfer: bytes
    timings: Timings
    kv_source: Literal["transfer", "compute"]
    phase: Phase = "waiting"
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    registered: int = 0
    pending: int = 0
    drafter: Drafter | None = None
    top_k: int = 0
    min_p: float = 0.0
    tally: Tally | None = None
    _root: bytes = b""
    _hashes: list[bytes] = field(default_factory=list)

    @classmethod
    def from_add(cls, add: Add, arrival: int, now: float) -> Sequence:
        """A waiting sequence for a validated ``add``; ``arrival`` orders sequences by age."""
        penalties = add.repetition_penalty, add.frequency_penalty, add.presence_penalty
        return cls(
            seq=add.seq,
            leg=add.leg,
            arrival=arrival,
            prompt_tokens=len(add.prompt_ids),
            emitted_from=len(add.forced_ids),
            ids=array("i", add.prompt_ids + add.forced_ids),
            max_tokens=add.max_tokens,
            temperature=add.temperature,
            top_p=add.top_p,
            seed=add.seed,
            stop_ids=frozenset(add.stop_ids),
            transfer=add.transfer,
            timings=Timings(now),
            kv_source="transfer" if add.leg == "decode" else "compute",
            top_k=add.top_k,
            min_p=add.min_p,
            tally=None if penalties == NO_PENALTIES else Tally(*penalties),
            _root=hashlib.blake2b(add.salt, digest_size=HASH_BYTES).digest(),
        )

    @property
    def output_tokens(self) -> int:
        """Output tokens known so far, given ones included; also the index of the next one."""
        return len(self.ids) - self.prompt_tokens

    @property
    def length(self) -> int:
        """Tokens known so far, and the one that is drawn but not told yet."""
        return len(self.ids) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens whose KV is not computed yet; 1 for a sequence that decodes."""
        return self.length - self.computed

    @property
    def ending(self) -> bool:
        """Is it certain that the token on its way is the last one here?"""
        return self.pending > 0 and (
            self.leg == "prefill" or self.output_tokens + self.pending >= self.max_tokens
        )

    @property
    def given_tokens(self) -> int:
        """Prompt and forced tokens: what a prefill leg computes and a transfer carries."""
        return self.prompt_tokens + self.emitted_from

    def finish(self) -> str:
        """Why the answer ends with its newest token, as in ``messages.Token``; "": it goes on."""
        if self.ids[-1] in self.stop_ids:
            return "stop"
        if self.output_tokens >= self.max_tokens:
            return "length"
        return "handoff" if self.leg == "prefill" else ""

    def hashes(self, num_blocks: int, block_tokens: int) -> list[bytes]:
        """Chained hashes of the first ``num_blocks`` blocks, each of ``block_tokens`` known tokens.

        Value i stands for all tokens up to the end of block i and for the tenant's salt.
        """
        known = self._hashes
        value = known[-1] if known else self._root
        for index in range(len(known), num_blocks):
            tokens = self.ids[index * block_tokens : (index + 1) * block_tokens].tobytes()
            value = hashlib.blake2b(tokens, key=value, digest_size=HASH_BYTES).digest()
            known.append(value)
        return known if len(known) == num_blocks else known[:num_blocks]
