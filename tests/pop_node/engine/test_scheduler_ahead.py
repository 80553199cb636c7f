"""The scheduler one step ahead of a device that tells late: the same texts, and all blocks back."""

from __future__ import annotations

import test_scheduler_random as synchronous
from engine_builders import a_scheduler, an_add
from hypothesis import given, settings
from hypothesis import strategies as st

from pop_node.engine.messages import Add, Drop, Token
from pop_node.engine.scheduling.schedule import Schedule
from pop_node.engine.scheduling.scheduler import Scheduler
from pop_node.engine.scheduling.sequence import Sequence
from tests.fakes.fake_model import FakeModel, answer, chain


class LateModel(FakeModel):
    """A fake device: steps are computed in order when they are launched, their tokens told later;
    a token that the host does not know is that of the step before."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        super().__init__(num_blocks, block_tokens)
        self._last: dict[Sequence, int] = {}

    def launch(self, schedule: Schedule) -> list[int]:
        texts = []
        for row in schedule.rows:
            ids = list(row.sequence.ids)
            if row.end > len(ids):
                ids.append(self._last[row.sequence])
            assert row.end <= len(ids)
            values = chain(ids[: row.end])
            for position in range(row.start):
                found = self.memory[self.slot(row.sequence.blocks, position)]
                assert found == values[position], f"position {position} holds another text"
            self.write(row.sequence.blocks, ids, row.start, row.end)
            texts.append(ids)
        drawn = [chain(texts[index])[-1] % self.vocabulary for index in schedule.sampled]
        self._last = {
            schedule.rows[index].sequence: token
            for index, token in zip(schedule.sampled, drawn, strict=True)
        }
        return [
            self.drawn(schedule.rows[index], token)
            for index, token in zip(schedule.sampled, drawn, strict=True)
        ]


class Driver:
    """What the engine's loop does with two steps under way."""

    def __init__(self, scheduler: Scheduler, model: LateModel) -> None:
        self._scheduler = scheduler
        self._model = model
        self.under_way: tuple[Schedule, list[int]] | None = None
        self.rows_ahead = 0

    def step(self, carry_out: object) -> bool:
        before = self.under_way
        if before is not None:
            self._scheduler.ahead(before[0])
        schedule, effects = self._scheduler.schedule(0.0)
        carry_out(effects)  # type: ignore[operator]
        self.under_way = None
        if schedule.rows:
            self.rows_ahead += sum(r.start >= len(r.sequence.ids) for r in schedule.rows)
            self.under_way = schedule, self._model.launch(schedule)
        if before is not None:
            carry_out(self._scheduler.complete(*before, 0.0))  # type: ignore[operator]
        return bool(schedule.rows) or before is not None


class Machine(synchronous.Machine):
    """The same rules and checks; commands come while a step is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LateModel(synchronous.BLOCKS, synchronous.BLOCK_TOKENS)
        self.driver = Driver(self.scheduler, self.model)

    def one_step(self) -> bool:
        return self.driver.step(self.carry_out)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

arrivals = st.lists(
    st.tuples(
        st.integers(0, 15),
        st.lists(st.integers(0, 3), min_size=1, max_size=20),
        st.integers(1, 12),
        st.booleans(),
    ),
    min_size=1,
    max_size=7,
)


def adds_of(drawn: list[tuple[int, list[int], int, bool]]) -> list[tuple[int, Add]]:
    return [
        (
            at,
            an_add(
                seq,
                prompt_ids=ids,
                max_tokens=more,
                stop_ids=list(range(0, 50, 6)) if stops else [],
            ),
        )
        for seq, (at, ids, more, stops) in enumerate(drawn, 1)
    ]


@given(drawn=arrivals, num_blocks=st.integers(8, 40))
def test_tokens_are_those_of_one_sequence_alone(
    drawn: list[tuple[int, list[int], int, bool]], num_blocks: int
) -> None:
    scheduler, pool = a_scheduler(num_blocks, 4, token_budget=9, max_sequences=4)
    driver = Driver(scheduler, LateModel(num_blocks, 4))
    queue = sorted(adds_of(drawn), key=lambda pair: pair[0])
    adds = {add.seq: add for _, add in queue}
    found: dict[int, list[int]] = {seq: [] for seq in adds}

    def carry_out(effects: list[object]) -> None:
        for effect in effects:
            if isinstance(effect, Token):
                found[effect.seq].append(effect.id)

    step = 0
    while queue or scheduler.num_sequences or driver.under_way:
        while queue and queue[0][0] <= step:
            carry_out(scheduler.handle(queue.pop(0)[1], 0.0))
        driver.step(carry_out)
        scheduler.check()
        step += 1
        assert step < 3000, "something starves"
    for seq, tokens in found.items():
        add = adds[seq]
        expected = answer(add.prompt_ids, add.max_tokens)
        stops = [i for i, token in enumerate(expected) if token in add.stop_ids]
        assert tokens == (expected[: stops[0] + 1] if stops else expected)
    assert pool.available == num_blocks


def test_steady_decoding_is_one_step_ahead_and_ends_without_a_row_in_vain() -> None:
    scheduler, _ = a_scheduler()
    driver = Driver(scheduler, LateModel(64, 4))
    scheduler.handle(an_add(1, max_tokens=6), 0.0)
    steps = 0
    while driver.step(lambda effects: None):
        steps += 1
    # A prefill, five rows whose token was not known, and the last answer's coming in.
    assert driver.rows_ahead == 5
    assert steps == 7


def test_a_drop_between_launch_and_answer_frees_everything() -> None:
    scheduler, pool = a_scheduler(8)
    driver = Driver(scheduler, LateModel(8, 4))
    scheduler.handle(an_add(1, max_tokens=9), 0.0)
    driver.step(lambda effects: None)
    driver.step(lambda effects: None)
    scheduler.handle(Drop(1), 0.0)
    tokens: list[object] = []
    while driver.step(tokens.extend):
        scheduler.check()
    assert tokens == []
    assert pool.available == 8
