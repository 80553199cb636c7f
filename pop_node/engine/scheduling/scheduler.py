"""Which tokens are computed next, and who holds which blocks.

Pure: no torch, no clock of its own, no IO. Continuous batching with chunked prefill under one token
budget per step; first come, first served; preemption by recompute.

Order. Decode rows go first, then prefill chunks by age, then new sequences are admitted. A sequence
is admitted when the blocks of all tokens it was given fit, so only decoding ever asks for more;
then the youngest running sequence gives way and is computed again later. Nothing overtakes an older
sequence that waits for blocks or a seat; a decode leg, which costs no compute yet, may pass
prefills that wait only for budget, for its blocks and seat come out of what they leave.

Invariants (``check``): a sequence holds blocks exactly while it is receiving, running or pinned,
and gives each back once; free + held + cached = all blocks.
"""

from __future__ import annotations

from bisect import insort
from typing import assert_never

from pop_node.engine.messages import (
    Add,
    Commit,
    Declined,
    Drop,
    Release,
    Retarget,
)
from pop_node.engine.scheduling.ahead import Ahead
from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.block_table import (
    fit,
    give_back,
    hold,
    lengthened,
    register_full,
    unregister,
)
from pop_node.engine.scheduling.booking import BROKEN, Breakages, book
from pop_node.engine.scheduling.books import check_books
from pop_node.engine.scheduling.schedule import (
    NO_TOKEN,
    Effect,
    Load,
    Row,
    Schedule,
    TransferClosed,
    TransferOpened,
    TransferRenamed,
    TransferUnbound,
)
from pop_node.engine.scheduling.sequence import Sequence
from pop_node.engine.scheduling.speculation import Speculation
from pop_node.engine.scheduling.telling import gone, held
from pop_node.engine.scheduling.validate import Limits, problem_with_add, problem_with_commit
from pop_node.engine.scheduling.waiting import Waiting, age

Command = Add | Drop | Retarget | Release | Commit


class Scheduler:
    """State of all sequences of one engine.

    The shell calls ``handle`` for each command, then ``schedule``, runs the rows, and ``complete``;
    it carries out the effects of each call before the next.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        *,
        token_budget: int,
        max_sequences: int,
        max_waiting: int,
        speculation: Speculation | None = None,
    ) -> None:
        """``speculation``: guess tokens ahead as far as it says; only for operations that are
        batch-invariant, and for shells that complete a step before the next is scheduled."""
        self._pool = pool
        self._limits = limits
        self._token_budget = token_budget
        self._max_sequences = max_sequences
        self._max_waiting = max_waiting
        self._speculation = speculation
        self._scheduled_at = 0.0
        self._ahead = Ahead()
        self._breakages = Breakages()
        self._arrivals = 0
        self._sequences: dict[int, Sequence] = {}
        self._waiting = Waiting()
        self._running: list[Sequence] = []  # by age
        self._receiving: dict[bytes, Sequence] = {}  # decode legs by transfer, blocks held
        self._exports: dict[bytes, Sequence] = {}  # prefill legs by transfer, from Add to end
        self._imports: dict[bytes, Sequence] = {}  # decode legs by transfer, from Add to Commit
        self._num_pinned = 0

    # ---- commands ------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> list[Effect]:
        """Take one command of the agent; ones about sequences that are gone do nothing."""
        match command:
            case Add():
                return self._add(command, now)
            case Drop(seq, kept_tokens):
                sequence = self._sequences.get(seq)
                return [] if sequence is None else self._drop(sequence, kept_tokens)
            case Retarget(transfer, new_transfer):
                return self._retarget(transfer, new_transfer)
            case Release(transfer):
                sequence = self._exports.get(transfer)
                return [] if sequence is None else self._end(sequence)
            case Commit(transfer, ids):
                return self._commit(transfer, ids)
            case _:
                assert_never(command)

    def _add(self, add: Add, now: float) -> list[Effect]:
        problem = problem_with_add(add, self._limits)
        transfers = {"prefill": self._exports, "decode": self._imports}.get(add.leg)
        if problem is None and (
            add.seq in self._sequences or (transfers is not None and add.transfer in transfers)
        ):
            problem = "invalid_request", "the sequence or its transfer is known already"
        if problem is None and self._waiting.num_new >= self._max_waiting:
            problem = "overloaded", f"{self._max_waiting} sequences wait already"
        if problem is not None:
            return [Declined(add.seq, *problem)]
        sequence = Sequence.from_add(add, self._arrivals, now)
        self._arrivals += 1
        self._sequences[add.seq] = sequence
        self._waiting.add(sequence)
        if transfers is not None:
            transfers[add.transfer] = sequence
        if sequence.leg == "prefill":
            return [TransferOpened(add.transfer, sequence.given_tokens)]
        return []

    def _drop(self, sequence: Sequence, kept_tokens: int) -> list[Effect]:
        """End a sequence; what a broken transfer brought in full stays in the prefix cache."""
        if sequence.phase == "receiving":
            sequence.computed = max(sequence.computed, min(kept_tokens, sequence.given_tokens))
            register_full(self._pool, sequence)
        return self._end(sequence)

    def _retarget(self, transfer: bytes, new_transfer: bytes) -> list[Effect]:
        """Re-key a prefill leg, whatever its phase; its blocks and what is computed stay."""
        sequence = self._exports.get(transfer)
        if sequence is None or new_transfer in self._exports:
            return []
        del self._exports[transfer]
        self._exports[new_transfer] = sequence
        sequence.transfer = new_transfer
        return [TransferRenamed(transfer, new_transfer)]

    def _commit(self, transfer: bytes, ids: list[int]) -> list[Effect]:
        """All KV of the given tokens is in the blocks: from here on it is a sequence like any."""
        sequence = self._receiving.get(transfer)
        if sequence is None:
            return []
        problem = problem_with_commit(sequence, ids, self._limits)
        if problem is not None:
            return self._end(sequence, Declined(sequence.seq, "protocol_error", problem))
        del self._receiving[transfer], self._imports[transfer]
        sequence.computed = sequence.given_tokens
        sequence.ids.extend(ids[sequence.emitted_from :])
        sequence.emitted_from = len(ids)
        sequence.kv_source = "compute"
        register_full(self._pool, sequence)
        effects: list[Effect] = [TransferClosed("import", transfer)]
        # After a hand-off later than the first token a few tokens are left to compute here, as one
        # chunk whose blocks must be there; a single one gets its block like any decode row.
        missing = 0
        if sequence.remaining > 1:
            missing = self._pool.blocks_for(len(sequence.ids)) - len(sequence.blocks)
        if missing > self._pool.available:
            self._wait_again(sequence)
        else:
            if missing > 0:
                sequence.blocks.extend(self._pool.allocate(missing))
            sequence.phase = "running"
            insort(self._running, sequence, key=age)
        return effects

    # ---- one step ------------------------------------------------------------------------------

    def schedule(self, now: float) -> tuple[Schedule, list[Effect]]:
        """Choose the rows of the next step; no rows when nothing can be computed."""
        effects: list[Effect] = []
        rows: list[Row] = []
        prefilling: list[Sequence] = []
        block_tokens = self._pool.block_tokens
        for sequence in tuple(self._running):
            length, computed = sequence.length, sequence.computed
            if length - computed > 1:
                prefilling.append(sequence)
            elif sequence.phase != "running" or sequence.ending:
                continue  # it has just given way to an older one, or its last token is on its way
            elif len(sequence.blocks) * block_tokens >= length or self._grow(sequence, effects):
                rows.append(Row(sequence, computed, 1))
        num_decoding = len(rows)
        budget = self._token_budget - num_decoding
        for sequence in prefilling:
            if budget == 0:
                break
            if sequence.phase == "running":
                budget -= self._chunk(sequence, budget, rows)
        if self._waiting:
            budget = self._admit(budget, rows, effects)
        if self._speculation is not None:
            self._scheduled_at = now
            decoding = [row.sequence for row in rows[:num_decoding]]
            for index, drafts in enumerate(self._speculation.drafts(decoding, budget)):
                if drafts:
                    rows[index] = lengthened(self._pool, rows[index], drafts, len(self._running))
        for row in rows:
            timings = row.sequence.timings
            if timings.started_at is None:
                timings.started_at = now
        return Schedule.of(rows), effects

    def ahead(self, schedule: Schedule) -> None:
        """Let ``schedule`` be called once before this step is complete; it must have no drafts and
        not be awaited."""
        self._ahead.begin(schedule)

    def complete(self, schedule: Schedule, ids: list[int], now: float) -> list[Effect]:
        """Book the step: ``ids`` are the tokens drawn, ``schedule.num_drawn`` of them in order.

        Those of a sequence that has ended meanwhile are dropped. One with ``NO_TOKEN`` is declined,
        and nothing that it computed is hit by others. Raises as ``Breakages.broke``.
        """
        self._ahead.settle(schedule)
        block_tokens = self._pool.block_tokens
        for row in schedule.rows:
            sequence = row.sequence
            if sequence.computed - sequence.registered * block_tokens >= block_tokens:
                register_full(self._pool, sequence)
        for sequence in schedule.completing:
            sequence.timings.computed_at = now
        if self._speculation is not None and schedule.prefill_tokens == 0:
            guesses = schedule.num_drafts
            sequences = schedule.num_tokens - guesses
            self._speculation.step(sequences, guesses, now - self._scheduled_at)
        assert len(ids) == schedule.num_drawn, "a token for each that was to be drawn"
        if max(ids, default=NO_TOKEN) != NO_TOKEN:
            self._breakages.drew()
        effects: list[Effect] = []
        at = 0
        for index in schedule.sampled:
            row = schedule.rows[index]
            end = at + 1 + len(row.drafts)
            if row.sequence.phase != "ended":
                self._book(row, ids[at:end], effects)
            at = end
        return effects

    def _book(self, row: Row, drawn: list[int], effects: list[Effect]) -> None:
        sequence, drafts = row.sequence, row.drafts
        accepted, finish = book(row, drawn, effects)
        if finish == BROKEN:
            unregister(self._pool, sequence)
            if sequence.phase == "waiting":  # it gave way meanwhile, with the token on its way
                self._waiting.tokens -= 1
            effects += self._end(sequence, self._breakages.broke(sequence.seq))
            return
        if drafts:
            assert self._speculation is not None, "a draft that nobody made"
            self._speculation.judge(sequence, len(drafts), accepted)
            sequence.computed += accepted
            register_full(self._pool, sequence)
        if finish == "handoff":
            self._running.remove(sequence)
            sequence.phase = "pinned"
            self._num_pinned += 1
        elif finish:
            effects += self._end(sequence)

    @staticmethod
    def _chunk(sequence: Sequence, budget: int, rows: list[Row]) -> int:
        count = min(sequence.remaining, budget)
        rows.append(Row(sequence, sequence.computed, count))
        return count

    # ---- blocks --------------------------------------------------------------------------------

    def _grow(self, sequence: Sequence, effects: list[Effect]) -> bool:
        """Make room for one more block; False when the sequence itself had to give way."""
        while self._pool.available == 0:
            victim = self._running[-1]
            if victim.ending:
                return False  # its blocks come free when the step under way is complete
            self._preempt(victim, effects)
            if victim is sequence:
                return False
        sequence.blocks.extend(self._pool.allocate(1))
        return True

    def _preempt(self, sequence: Sequence, effects: list[Effect]) -> None:
        self._running.remove(sequence)
        if sequence.leg == "prefill":
            effects.append(TransferUnbound(sequence.transfer))
        self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        give_back(self._pool, sequence)
        sequence.phase = "waiting"
        self._waiting.put_back(sequence)

    # ---- admission -----------------------------------------------------------------------------

    def _admit(self, budget: int, rows: list[Row], effects: list[Effect]) -> int:
        """Let waiting sequences in; what is left of the budget."""
        seats = self._max_sequences - len(self._running) - len(self._receiving)
        reserved = 0  # blocks that older sequences, which wait only for budget, will take
        admitted: list[Sequence] = []
        for sequence in self._waiting:
            if seats == 0 or sequence.pending or (budget == 0 and not self._waiting.decode_legs):
                break
            hits, new = fit(self._pool, sequence)
            idle = self._pool.unheld(hits)
            headroom = len(self._running) + len(admitted)  # a block for each, before they grow
            if reserved + new + idle + headroom > self._pool.available:
                break
            seats -= 1
            if budget == 0 and sequence.kv_source == "compute":
                reserved += new + idle
                continue
            admitted.append(sequence)
            self._hold(sequence, hits, new, effects)
            if sequence.kv_source == "compute":
                budget -= self._chunk(sequence, budget, rows)
        for sequence in admitted:
            self._waiting.leave(sequence)
            if sequence.kv_source == "transfer":
                sequence.phase = "receiving"
                self._receiving[sequence.transfer] = sequence
            else:
                sequence.phase = "running"
                insort(self._running, sequence, key=age)
        return budget

    def _hold(self, sequence: Sequence, hits: list[int], new: int, effects: list[Effect]) -> None:
        if sequence.kv_source == "compute":
            self._waiting.tokens -= sequence.remaining
        cached = hold(self._pool, sequence, hits, new)
        effects += held(sequence, cached, is_new=self._waiting.is_new(sequence))

    # ---- ends ----------------------------------------------------------------------------------

    def _end(self, sequence: Sequence, last: Declined | None = None) -> list[Effect]:
        """Free everything a sequence holds, whatever its phase; ``last`` as in ``gone``."""
        match sequence.phase:
            case "waiting":
                self._waiting.remove(sequence)
            case "receiving":
                del self._receiving[sequence.transfer]
            case "running":
                self._running.remove(sequence)
            case "pinned":
                self._num_pinned -= 1
        give_back(self._pool, sequence)
        sequence.phase = "ended"
        del self._sequences[sequence.seq]
        if sequence.leg == "prefill":
            del self._exports[sequence.transfer]
        elif sequence.kv_source == "transfer":
            del self._imports[sequence.transfer]
        return gone(sequence, last)

    # ---- facts ---------------------------------------------------------------------------------

    def load(self) -> Load:
        """How busy the engine is now. Linear in the running sequences."""
        prefill = 0
        for sequence in self._running:
            remaining = sequence.remaining
            if remaining > 1:
                prefill += remaining
        guessed = self._speculation
        return Load(
            queued_prefill_tokens=self._waiting.tokens + prefill,
            running=len(self._running),
            waiting=len(self._waiting),
            free_blocks=self._pool.free,
            cached_blocks=self._pool.cached,
            pinned=self._num_pinned + len(self._receiving),
            drafted=guessed.drafted if guessed else 0,
            accepted=guessed.accepted if guessed else 0,
        )

    @property
    def num_sequences(self) -> int:
        """Sequences in any phase but ended."""
        return len(self._sequences)

    def check(self) -> None:
        """Raise ``AssertionError`` if the books disagree with each other. Linear in everything."""
        every, receiving = self._sequences.values(), self._receiving.values()
        check_books(self._pool, every, self._waiting, self._running, receiving, self._num_pinned)
