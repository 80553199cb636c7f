"""A sequence for which no token can be drawn ends alone; an engine that draws none gives up."""

from __future__ import annotations

import pytest
from engine_builders import an_add
from stepped_engine import Engine, expected, receive

from pop_node.engine.messages import Allocated, Commit, Declined, Ended
from pop_node.engine.scheduling.booking import BROKEN, BROKEN_IN_A_ROW, book
from pop_node.engine.scheduling.schedule import NO_TOKEN, Effect, Row, TransferClosed
from pop_node.engine.scheduling.sequence import Sequence
from tests.fakes.fake_model import answer

PROMPT = list(range(10))


def test_one_of_a_batch_breaks_and_the_others_go_on() -> None:
    engine = Engine()
    for seq in (1, 2, 3):
        engine.tell(an_add(seq, prompt_ids=[seq] * 10, max_tokens=8))
    while len(engine.tokens(2)) < 3:
        engine.step()
    engine.model.sick.add(2)
    engine.step()
    assert engine.effects.count(
        Declined(2, "internal_error", "the model's numbers for this answer are not finite")
    ) == len(engine.said(Declined))
    engine.finish()
    assert engine.tokens(2) == expected([2] * 10, 8, "length")[:3]
    for seq in (1, 3):
        assert engine.tokens(seq) == expected([seq] * 10, 8, "length")
    assert Ended(2) not in engine.effects
    assert engine.pool.available == 64


@pytest.mark.parametrize("is_sick", [True, False])
def test_what_a_broken_sequence_computed_is_hit_by_nobody(is_sick: bool) -> None:
    engine = Engine()
    engine.tell(an_add(1, prompt_ids=PROMPT))
    engine.step()
    engine.tell(an_add(2, prompt_ids=PROMPT, max_tokens=50))  # holds the blocks of the first
    engine.step()
    if is_sick:
        engine.model.sick.add(1)
    engine.finish()
    engine.tell(an_add(3, prompt_ids=PROMPT))
    engine.step()
    hits = {said.seq: said.cached_tokens for said in engine.said(Allocated)}
    assert hits == {1: 0, 2: 8, 3: 0 if is_sick else 8}
    engine.finish()
    assert engine.tokens(3) == expected(PROMPT, 5, "length")


def test_a_prefill_leg_closes_its_transfer_first() -> None:
    engine = Engine()
    add = an_add(1, leg="prefill")
    engine.model.sick.add(1)
    engine.tell(add)
    engine.finish()
    closed, declined = engine.effects[-2:]
    assert closed == TransferClosed("export", add.transfer)
    assert isinstance(declined, Declined)
    assert engine.pool.available == 64


def test_a_decode_leg_breaks_after_its_commit() -> None:
    engine = Engine()
    bound = receive(engine, an_add(1, leg="decode", prompt_ids=PROMPT))
    engine.model.write(bound.blocks, PROMPT, 0, len(PROMPT))
    engine.tell(Commit(bound.transfer, answer(PROMPT, 1)))
    engine.model.sick.add(1)
    engine.finish()
    assert isinstance(engine.effects[-1], Declined)
    assert engine.pool.available == 64


def test_right_guesses_before_the_break_are_told() -> None:
    sequence = Sequence.from_add(an_add(1, max_tokens=50), 0, 0.0)
    effects: list[Effect] = []
    row = Row(sequence, 9, 4, (4, 5, 6))
    assert book(row, [4, 5, NO_TOKEN, 9], effects) == (2, BROKEN)
    assert sequence.ids[10:].tolist() == [4, 5]
    assert len(effects) == 2
    # A guess that was wrong hides what comes after it.
    assert book(Row(sequence, 11, 3, (4, 5)), [7, NO_TOKEN, NO_TOKEN], effects) == (0, "")


def test_an_engine_that_draws_nothing_any_more_gives_up() -> None:
    engine = Engine()
    engine.model.sick.update(range(100))
    for seq in range(1, BROKEN_IN_A_ROW):
        engine.tell(an_add(seq))
        engine.finish()
    engine.tell(an_add(100))
    engine.finish()
    assert engine.tokens(100) == expected(PROMPT, 5, "length")
    for seq in range(BROKEN_IN_A_ROW, 2 * BROKEN_IN_A_ROW - 1):  # counted anew
        engine.tell(an_add(seq))
        engine.finish()
    assert len(engine.said(Declined)) == 2 * (BROKEN_IN_A_ROW - 1)
    engine.tell(an_add(99))
    with pytest.raises(ArithmeticError, match=f"{BROKEN_IN_A_ROW} sequences"):
        engine.finish()
