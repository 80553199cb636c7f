"""The scheduler under random adds, drops, hand-overs and preemptions: the text is always right."""

from __future__ import annotations

from engine_builders import a_scheduler, an_add
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pop_node.engine.messages import (
    Add,
    Commit,
    Declined,
    Drop,
    Ended,
    Release,
    Retarget,
    Token,
)
from pop_node.engine.scheduling.booking import BROKEN_IN_A_ROW
from pop_node.engine.scheduling.schedule import (
    Effect,
    TransferBound,
    TransferClosed,
    TransferOpened,
    TransferRenamed,
    TransferUnbound,
)
from pop_node.engine.scheduling.speculation import Speculation
from tests.fakes.fake_model import VOCABULARY, FakeModel, answer

BLOCKS, BLOCK_TOKENS = 12, 3
STEPS_TO_REST = 2000

# Few distinct beginnings, so that prefixes are shared all the time.
prompts = st.tuples(
    st.sampled_from([[1] * 9, [1] * 6 + [2] * 5, [3]]), st.lists(st.integers(0, 2), max_size=8)
).map(lambda parts: parts[0] + parts[1])


class Machine(RuleBasedStateMachine):
    """Keeps, besides the scheduler, only what an agent knows."""

    vocabulary = VOCABULARY

    @staticmethod
    def speculation() -> Speculation | None:
        """Nothing is guessed."""
        return None

    def __init__(self) -> None:
        super().__init__()
        self.scheduler, self.pool = a_scheduler(
            *(BLOCKS, BLOCK_TOKENS),
            token_budget=7,
            max_sequences=5,
            max_waiting=6,
            speculation=self.speculation(),
        )
        self.model = FakeModel(BLOCKS, BLOCK_TOKENS, self.vocabulary)
        self.next_seq = 1
        self.live: dict[int, Add] = {}
        self.given: dict[int, list[int]] = {}  # all ids that a sequence starts from
        self.next_index: dict[int, int] = {}
        self.finish: dict[int, str] = {}
        self.arriving: dict[bytes, TransferBound] = {}
        self.exports: dict[bytes, bool] = {}  # opened transfers: do blocks stand behind them?

    # ---- what the agent may do -------------------------------------------------------------------

    @rule(
        leg=st.sampled_from(["both", "both", "prefill", "decode"]),
        prompt=prompts,
        forced=st.lists(st.integers(0, 2), max_size=3),
        more=st.integers(1, 20),
        stops=st.booleans(),
    )
    def add(self, leg: str, prompt: list[int], forced: list[int], more: int, stops: bool) -> None:
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        add = an_add(
            seq,
            leg=leg,
            prompt_ids=prompt,
            forced_ids=forced,
            max_tokens=len(forced) + more,
            stop_ids=list(range(0, 50, 7)) if stops else [],
            salt=b"odd" if seq % 5 == 0 else b"even",
        )
        self.live[seq] = add
        self.given[seq] = prompt + forced
        self.next_index[seq] = len(forced)
        self.carry_out(self.scheduler.handle(add, 0.0))

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.live:
            seq = data.draw(st.sampled_from(sorted(self.live)))
            bound = self.arriving.get(self.live[seq].transfer)
            kept = 0
            if bound is not None:  # its hand-over broke after so many tokens
                kept = data.draw(st.integers(bound.held_tokens, bound.total_tokens))
                self.model.write(bound.blocks, self.given[seq], bound.held_tokens, kept)
            self.carry_out(self.scheduler.handle(Drop(seq, kept), 0.0))
            assert seq not in self.live

    @rule(data=st.data())
    def retarget(self, data: st.DataObject) -> None:
        if self.exports:
            old = data.draw(st.sampled_from(sorted(self.exports)))
            new = self.next_seq.to_bytes(16, "little")
            self.next_seq += 1
            self.carry_out(self.scheduler.handle(Retarget(old, new), 0.0))
            assert new in self.exports

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.exports:
            transfer = data.draw(st.sampled_from(sorted(self.exports)))
            self.carry_out(self.scheduler.handle(Release(transfer), 0.0))
            assert transfer not in self.exports

    @rule(data=st.data(), ahead=st.integers(1, 3))
    def deliver(self, data: st.DataObject, ahead: int) -> None:
        if self.arriving:
            self.commit(data.draw(st.sampled_from(sorted(self.arriving))), ahead)

    @rule(data=st.data())
    def break_one(self, data: st.DataObject) -> None:
        """From here on no token can be drawn for it; too few break for the engine to give up."""
        if self.live and len(self.model.sick) < BROKEN_IN_A_ROW - 1:
            self.model.sick.add(data.draw(st.sampled_from(sorted(self.live))))

    @rule()
    def step(self) -> None:
        self.one_step()

    # ---- carrying out -----------------------------------------------------------------------

    def commit(self, transfer: bytes, ahead: int) -> None:
        bound = self.arriving[transfer]
        seq = next(s for s, a in self.live.items() if a.transfer == transfer)
        add, given = self.live[seq], self.given[seq]
        room = add.max_tokens - len(add.forced_ids) - 1
        ahead = min(ahead, room)
        if ahead < 1:  # such a request ends at its prefill node; its decode leg is dropped
            self.carry_out(self.scheduler.handle(Drop(seq), 0.0))
            return
        self.model.write(bound.blocks, given, bound.held_tokens, bound.total_tokens)
        new = answer(given, ahead, self.vocabulary)
        self.given[seq] = given + new
        self.next_index[seq] += ahead
        self.carry_out(self.scheduler.handle(Commit(transfer, add.forced_ids + new), 0.0))
        assert transfer not in self.arriving

    def one_step(self) -> bool:
        schedule, effects = self.scheduler.schedule(0.0)
        self.carry_out(effects)
        assert schedule.num_tokens == sum(row.count for row in schedule.rows) <= 7
        self.carry_out(self.scheduler.complete(schedule, self.model.run(schedule), 0.0))
        return bool(schedule.rows)

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Token(seq, index, token, finish):
                    add = self.live[seq]
                    assert index == self.next_index[seq], "an index was skipped or repeated"
                    assert seq not in self.finish, "a token after the finish"
                    self.next_index[seq] += 1
                    self.given[seq] = [*self.given[seq], token]
                    assert token == self.after(self.given[seq][:-1]), "wrong text"
                    assert finish == self.expected_finish(add, index, token)
                    if finish:
                        self.finish[seq] = finish
                case Ended(seq) | Declined(seq):
                    del self.live[seq]
                case TransferOpened(transfer):
                    self.exports[transfer] = False
                case TransferBound("export", transfer):
                    assert not self.exports[transfer]
                    self.exports[transfer] = True
                case TransferBound("import", transfer):
                    assert transfer not in self.arriving
                    self.arriving[transfer] = effect
                case TransferUnbound(transfer):
                    assert self.exports[transfer]
                    self.exports[transfer] = False
                case TransferRenamed(transfer, new_transfer):
                    self.exports[new_transfer] = self.exports.pop(transfer)
                case TransferClosed("export", transfer):
                    del self.exports[transfer]
                case TransferClosed("import", transfer):
                    self.arriving.pop(transfer, None)

    def after(self, ids: list[int]) -> int:
        """The one right token after ``ids``."""
        return answer(ids, 1, self.vocabulary)[0]

    @staticmethod
    def expected_finish(add: Add, index: int, token: int) -> str:
        if token in add.stop_ids:
            return "stop"
        if index + 1 == add.max_tokens:
            return "length"
        return "handoff" if add.leg == "prefill" else ""

    @invariant()
    def books_agree(self) -> None:
        self.scheduler.check()
        assert self.scheduler.num_sequences == len(self.live)

    def teardown(self) -> None:
        """Everything comes to rest, and nothing is held."""
        for _ in range(STEPS_TO_REST):
            if self.one_step():
                continue
            if self.arriving:
                self.commit(min(self.arriving), 1)
            elif self.exports:
                pinned = [t for t, bound in self.exports.items() if bound]
                self.carry_out(self.scheduler.handle(Release(min(pinned)), 0.0))
            else:
                break
        assert not self.live, "something starves"
        assert self.pool.available == BLOCKS
        assert self.scheduler.load().waiting == self.scheduler.load().running == 0
        self.scheduler.check()


class GuessingMachine(Machine):
    """The same of a text of two words, in which many guesses are right and many wrong."""

    vocabulary = 2

    @staticmethod
    def speculation() -> Speculation | None:
        """A free row: everything that can be guessed is."""
        return Speculation()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestGuessingMachine = GuessingMachine.TestCase
TestGuessingMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
