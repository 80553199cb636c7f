"""What the scheduler does with guesses, one promise a test; see also ``test_scheduler_random``."""

from __future__ import annotations

from typing import Any

import pytest
from engine_builders import an_add
from stepped_engine import Engine

from pop_node.engine.messages import Ended, Token
from pop_node.engine.scheduling.drafter import Drafter
from pop_node.engine.scheduling.sequence import Sequence
from pop_node.engine.scheduling.speculation import Speculation
from tests.fakes.fake_model import FakeModel, answer

WORDS = 2


class GuessingEngine(Engine):
    """An engine whose texts have two words, with guesses."""

    def __init__(self, num_blocks: int = 64, block_tokens: int = 4, **limits: Any) -> None:
        self.speculation = Speculation()
        super().__init__(num_blocks, block_tokens, speculation=self.speculation, **limits)
        self.model = FakeModel(num_blocks, block_tokens, WORDS)
        self.num_steps = 0

    def step(self) -> dict[int, int]:
        self.num_steps += 1
        return super().step()

    def ids(self, seq: int) -> list[int]:
        return [token for _, token, _ in self.tokens(seq)]


PROMPT = [0, 1, 1, 0] * 4


def test_the_text_is_the_same_in_fewer_steps() -> None:
    engine = GuessingEngine()
    engine.tell(an_add(1, prompt_ids=PROMPT, max_tokens=120))
    engine.finish()
    assert engine.ids(1) == answer(PROMPT, 120, WORDS)
    assert [index for index, _, _ in engine.tokens(1)] == list(range(120))
    assert engine.speculation.accepted == 120 - (engine.num_steps - 1)  # the last one is idle
    assert 20 < engine.speculation.accepted < engine.speculation.drafted
    load = engine.scheduler.load()
    assert (load.drafted, load.accepted) == (
        engine.speculation.drafted,
        engine.speculation.accepted,
    )
    assert engine.pool.available == 64


def test_an_answer_ends_inside_an_accepted_run() -> None:
    text = answer(PROMPT, 60, WORDS)
    for stop in range(60):
        engine = GuessingEngine()
        # The first occurrence of a word ends the text, so a word that is nowhere else is put there.
        engine.model.run = _with_word(engine.model, stop)  # type: ignore[method-assign]
        engine.tell(an_add(1, prompt_ids=PROMPT, max_tokens=60, stop_ids=[7]))
        engine.finish()
        assert engine.ids(1) == [*text[:stop], 7]
        assert engine.tokens(1)[-1][2] == "stop"
        assert engine.effects[-1] == Ended(1)
        assert engine.pool.available == 64


def _with_word(model: FakeModel, at: int) -> Any:
    """``model.run``, but output ``at`` is 7, which ends the answer."""
    plain = FakeModel.run

    def run(schedule: Any) -> list[int]:
        ids = plain(model, schedule)
        first = 0
        for index in schedule.sampled:
            row = schedule.rows[index]
            place = at - row.sequence.output_tokens
            if 0 <= place <= len(row.drafts):
                ids[first + place] = 7
            first += 1 + len(row.drafts)
        return ids

    return run


def test_guesses_take_only_what_is_left_of_the_budget() -> None:
    engine = GuessingEngine(token_budget=6, max_sequences=2)
    engine.tell(an_add(1, prompt_ids=PROMPT, max_tokens=60))
    engine.tell(an_add(2, prompt_ids=[1] * 40, max_tokens=60))
    most = 0
    while rows := engine.step():
        assert sum(rows.values()) <= 6
        most = max(most, *rows.values())
    assert most > 1
    assert engine.ids(1) == answer(PROMPT, 60, WORDS)
    assert engine.ids(2) == answer([1] * 40, 60, WORDS)


def test_nobody_gives_way_to_a_guess() -> None:
    """With too few blocks the order of events is that of an engine that does not guess."""
    engine = GuessingEngine(num_blocks=9, token_budget=64)
    for seq in (1, 2, 3):
        engine.tell(an_add(seq, prompt_ids=[seq % 2] * 6, max_tokens=20, salt=b"%d" % seq))
    engine.finish()
    assert engine.speculation.accepted > 0
    for seq in (1, 2, 3):
        assert engine.ids(seq) == answer([seq % 2] * 6, 20, WORDS)
    assert engine.pool.available == 9


class OneIsGuessed(Speculation):
    """Eight wrong guesses for the sequence with that number, in each step."""

    def drafts(self, sequences: list[Sequence], budget: int) -> list[tuple[int, ...]]:
        for sequence in sequences:
            sequence.drafter = sequence.drafter or Drafter()
        return [(0,) * 8 if sequence.seq == 2 else () for sequence in sequences]


@pytest.mark.parametrize(("left", "drafts"), [(1, 2), (3, 2), (4, 8), (9, 8)])
def test_a_guess_leaves_each_running_sequence_a_block(left: int, drafts: int) -> None:
    """Two sequences of six tokens have two blocks of four each: two guesses fit without another,
    eight want two more, of which there are enough if two are ``left`` besides."""
    engine = Engine(num_blocks=4 + left, speculation=OneIsGuessed(), token_budget=64)
    for seq in (1, 2):
        engine.tell(an_add(seq, prompt_ids=[seq] * 5, max_tokens=13, salt=b"%d" % seq))
    assert engine.step() == {1: 5, 2: 5}
    schedule, _ = engine.scheduler.schedule(0.0)
    assert {row.sequence.seq: len(row.drafts) for row in schedule.rows}[2] == drafts


class Listening(Speculation):
    """Guesses nothing; remembers which steps it was told of."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int]] = []

    def drafts(self, sequences: list[Sequence], budget: int) -> list[tuple[int, ...]]:
        return []

    def step(self, sequences: int, guesses: int, seconds: float) -> None:
        self.told.append((sequences, guesses))


def test_what_a_step_costs_is_learned_from_steps_that_only_decode() -> None:
    listening = Listening()
    engine = Engine(speculation=listening)
    engine.tell(an_add(1, prompt_ids=[1] * 5, max_tokens=9))
    engine.step()
    engine.step()
    engine.tell(an_add(2, prompt_ids=[2] * 40, max_tokens=2))
    while not engine.tokens(2):
        engine.step()
    assert len(engine.tokens(1)) > 4
    assert listening.told == [(1, 0)]
    engine.step()
    assert listening.told == [(1, 0), (2, 0)]


def test_wrong_guesses_are_never_found_in_the_cache() -> None:
    """Blocks whose KV was guessed wrong are not what a later prompt hits."""
    engine = GuessingEngine(block_tokens=2)
    engine.tell(an_add(1, prompt_ids=PROMPT, max_tokens=40))
    engine.finish()
    assert engine.speculation.drafted > engine.speculation.accepted
    text = PROMPT + answer(PROMPT, 40, WORDS)
    engine.tell(an_add(2, prompt_ids=text, max_tokens=9))
    engine.finish()  # the model checks every position that it reads
    assert engine.ids(2) == answer(text, 9, WORDS)
    other = [*text[:30], 1 - text[30]]
    engine.tell(an_add(3, prompt_ids=other, max_tokens=9))
    engine.finish()
    assert engine.ids(3) == answer(other, 9, WORDS)


def test_forced_ids_are_learned_from() -> None:
    """A continuation guesses from what was said elsewhere, and says the same."""
    text = answer(PROMPT, 80, WORDS)
    for forced in (1, 37, 79):
        engine = GuessingEngine()
        engine.tell(an_add(1, prompt_ids=PROMPT, forced_ids=text[:forced], max_tokens=80))
        engine.finish()
        assert engine.ids(1) == text[forced:]
        assert [e.index for e in engine.said(Token)] == list(range(forced, 80))
