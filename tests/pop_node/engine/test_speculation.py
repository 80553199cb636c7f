"""When guessing pays: what a row costs, what guesses are worth, and how one learns otherwise."""

from __future__ import annotations

import math
import random

import pytest
from engine_builders import an_add
from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine.scheduling.drafter import LONGEST_PAUSE, Drafter
from pop_node.engine.scheduling.sequence import Sequence
from pop_node.engine.scheduling.speculation import Speculation
from pop_node.engine.scheduling.step_cost import MAX_AGE, StepCost

REPEATING = [1, 2, 3, 4] * 5


def a_sequence(max_tokens: int = 1000, **changes: object) -> Sequence:
    return Sequence.from_add(an_add(prompt_ids=REPEATING, max_tokens=max_tokens, **changes), 0, 0.0)


def learned(fixed: float, row: float, batch: int) -> Speculation:
    """From plain steps of ``batch`` sequences and from guesses that cost so much of one."""
    speculation = Speculation()
    for at in range(400):
        guesses = at % 5
        extra = fixed + row * guesses if guesses else 0.0
        speculation.step(batch, guesses, 0.01 * (1.0 + extra))
    return speculation


def guess(speculation: Speculation, sequence: Sequence, budget: int = 100) -> tuple[int, ...]:
    """What is guessed of one sequence, beside which nobody decodes."""
    speculation.step(1, 0, 0.01)
    found = speculation.drafts([sequence], budget)
    return found[0] if found else ()


@given(
    fixed=st.floats(0.0, 0.5),
    row=st.floats(0.0, 1.0),
    batch=st.integers(1, 16),
    noise=st.integers(0, 1000),
)
def test_the_cost_of_guesses_is_found_in_steps_with_and_without(
    fixed: float, row: float, batch: int, noise: int
) -> None:
    cost, rng = StepCost(), random.Random(noise)
    for _ in range(400):
        guesses = rng.choice([0, 0, 1, 3, 8])
        busy = 40.0 if rng.random() < 0.01 else 1.0  # somebody else had the processor
        extra = fixed + row * guesses if guesses else 0.0
        cost.step(batch, guesses, busy * rng.uniform(0.98, 1.02) * 0.01 * (1.0 + extra))
    found = cost.extra(batch)
    assert found[0] + 4 * found[1] == pytest.approx(fixed + row * 4, abs=0.1, rel=0.2)


@given(
    steps=st.lists(
        st.tuples(st.integers(1, 64), st.integers(0, 64), st.floats(0.0, 10.0)), max_size=60
    ),
    batch=st.integers(1, 64),
)
def test_a_cost_is_one_whatever_was_measured(
    steps: list[tuple[int, int, float]], batch: int
) -> None:
    cost = StepCost()
    for sequences, guesses, seconds in steps:
        cost.step(sequences, guesses, seconds)
    assert all(0.0 <= part < math.inf for part in cost.extra(batch))


def test_plain_steps_are_taken_before_guessing_and_now_and_then() -> None:
    speculation, sequence = Speculation(), a_sequence()
    assert speculation.drafts([sequence], 100) == []
    speculation.step(1, 0, 0.01)
    kinds = []
    for _ in range(100):
        found = speculation.drafts([sequence], 100)
        kinds.append(bool(found))
        if found:
            speculation.judge(sequence, len(found[0]), len(found[0]))
        speculation.step(1, len(found[0]) if found else 0, 0.01)
    assert kinds.count(False) == 100 // (MAX_AGE + 1)


def test_drafts_are_long_where_rows_are_cheap_and_guesses_good() -> None:
    speculation, sequence = learned(0.0, 0.03, 1), a_sequence()
    for _ in range(6):
        drafts = guess(speculation, sequence)
        speculation.judge(sequence, len(drafts), len(drafts))
    assert guess(speculation, sequence) == (1, 2, 3, 4, 1, 2, 3, 4)
    assert guess(speculation, sequence, 3) == (1, 2, 3)
    assert guess(speculation, sequence, 0) == ()
    assert speculation.drafted == speculation.accepted > 0


def test_nothing_is_guessed_beyond_the_last_token_or_of_a_leg_that_hands_off() -> None:
    speculation = Speculation()
    assert guess(speculation, a_sequence(max_tokens=1)) == ()
    assert len(guess(speculation, a_sequence(max_tokens=3))) == 2
    assert guess(speculation, a_sequence(leg="prefill")) == ()


@pytest.mark.parametrize("penalty", ["repetition", "frequency", "presence"])
def test_nothing_is_guessed_where_repeating_is_penalised(penalty: str) -> None:
    """What is drawn after a guess would have to count the guesses before it."""
    speculation, sequence = Speculation(), a_sequence(**{f"{penalty}_penalty": 1.5})
    assert not any(guess(speculation, sequence) for _ in range(20))
    assert guess(speculation, a_sequence())


def test_wrong_guesses_end_guessing_and_it_is_tried_again_ever_more_rarely() -> None:
    speculation, sequence = learned(0.0, 0.5, 1), a_sequence()
    tried = []
    for step in range(4000):
        drafts = guess(speculation, sequence)
        if drafts:
            tried.append(step)
            speculation.judge(sequence, len(drafts), 0)
    assert 4 < len(tried) < 40
    assert tried[-1] - tried[-2] > LONGEST_PAUSE
    # A text that begins to repeat itself is noticed by a later try.
    for _ in range(20 * LONGEST_PAUSE):
        drafts = guess(speculation, sequence)
        if drafts:
            speculation.judge(sequence, len(drafts), len(drafts))
    assert len(drafts) > 1


def test_where_rows_cost_as_much_as_steps_nothing_is_guessed() -> None:
    speculation = learned(0.0, 1.0, 1)
    assert not any(guess(speculation, a_sequence()) for _ in range(10))


def test_few_guesses_do_not_pay_for_a_step_that_costs_a_tile_more() -> None:
    """Of sixteen sequences one repeats itself: what it would gain is less than the fixed cost."""
    speculation = learned(0.2, 0.01, 16)
    copying = a_sequence()
    others = [
        Sequence.from_add(an_add(seq, prompt_ids=[*range(20)], max_tokens=999), 0, 0.0)
        for seq in range(15)
    ]
    assert speculation.drafts([copying, *others], 500) == []
    found = speculation.drafts([a_sequence() for _ in range(16)], 500)
    assert all(found)
    assert len(found) == 16


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize(
    ("fixed", "row", "batch"), [(0.1, 0.03, 1), (0.0, 0.04, 4), (0.15, 0.02, 16), (0.0, 0.06, 16)]
)
def test_guessing_pays_or_costs_next_to_nothing(
    chance: float, fixed: float, row: float, batch: int
) -> None:
    """Tokens per second against those without, for texts whose guesses are right by ``chance``."""
    speculation = learned(fixed, row, batch)
    sequences = [a_sequence(max_tokens=10**6) for _ in range(batch)]
    rng = random.Random(3)
    seconds = tokens = 0.0
    for _ in range(500):
        found = speculation.drafts(sequences, 500) or [()] * batch
        for sequence, drafts in zip(sequences, found, strict=True):
            accepted = 0
            while accepted < len(drafts) and rng.random() < chance:
                accepted += 1
            if drafts:
                speculation.judge(sequence, len(drafts), accepted)
            tokens += 1 + accepted
        guesses = sum(map(len, found))
        took = 0.01 * (1.0 + (fixed + row * guesses if guesses else 0.0))
        speculation.step(batch, guesses, took)
        seconds += took
    gain = tokens / seconds / (batch / 0.01)
    assert gain > 0.98
    if chance == 0.95 and row * batch < 0.5:
        assert gain > 1.5


def test_a_new_sequence_starts_from_what_the_others_were_like() -> None:
    good, bad = Drafter(), Drafter()
    assert good.length(0.3, 0.9) > 1
    assert bad.length(0.3, 0.1) == 1  # to see for itself
    bad.judge(1, 0)
    assert bad.length(0.3, 0.1) == 0


def test_what_the_others_were_like_is_learned_from_all_of_them() -> None:
    lengths = []
    for right in (True, False):
        speculation = learned(0.0, 0.03, 1)
        for _ in range(60):
            sequence = a_sequence()
            drafts = guess(speculation, sequence)
            if drafts:
                speculation.judge(sequence, len(drafts), len(drafts) if right else 0)
        lengths.append(len(guess(speculation, a_sequence())))
    first = len(guess(learned(0.0, 0.03, 1), a_sequence()))
    assert lengths[1] < 2 < first < lengths[0] == 8
