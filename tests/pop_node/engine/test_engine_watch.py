"""An engine that is frozen or stuck is given up, a busy one is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine.watch import LOOKS, STUCK_MIN_S, STUCK_STEPS, EngineWatch

SHORT_S = 0.01
"""Longest step of a small model."""


def looks(watch: EngineWatch, times: int) -> list[str | None]:
    return [watch.look() for _ in range(times)]


def test_an_engine_that_says_nothing_is_frozen_after_the_detection_time():
    watch = EngineWatch(3.0, SHORT_S)
    assert watch.period_s * LOOKS == 3.0
    assert looks(watch, LOOKS) == [None] * (LOOKS - 1) + ["frozen"]


def test_one_beat_counts_for_all_silence_before_it():
    watch = EngineWatch(3.0, SHORT_S)
    for _ in range(20):
        assert looks(watch, LOOKS - 1) == [None] * (LOOKS - 1)
        watch.beat(0.0)


def test_an_agent_that_slept_itself_does_not_blame_its_engine():
    """However long it slept, its timer fired once; what the engine said is read before the next."""
    watch = EngineWatch(1.0, SHORT_S)
    watch.beat(0.0)
    assert watch.look() is None


def test_a_main_loop_that_beats_but_never_ends_its_step_is_stuck():
    watch = EngineWatch(5.0, SHORT_S)
    watch.beat(STUCK_MIN_S - 0.1)
    assert watch.look() is None
    watch.beat(STUCK_MIN_S)
    assert watch.look() == "stuck"


def test_a_main_loop_is_given_several_of_its_longest_steps():
    watch = EngineWatch(5.0, SHORT_S)
    longest_s = STUCK_MIN_S - 1.0
    for busy_s in (longest_s / 2, longest_s, 0.0, 2 * STUCK_MIN_S):
        watch.beat(busy_s)
        assert watch.look() is None
    watch.beat(STUCK_STEPS * longest_s)
    assert watch.look() == "stuck"


def test_a_step_under_way_is_no_measure_of_itself():
    watch = EngineWatch(5.0, SHORT_S)
    for tenths in range(int(10 * STUCK_MIN_S)):
        watch.beat(tenths / 10)
        assert watch.look() is None
    watch.beat(STUCK_MIN_S + 1)
    assert watch.look() == "stuck"


def test_the_first_long_prompt_of_a_big_model_is_not_stuck():
    """It has taken no step yet, but its warm-up says how long one may take."""
    watch = EngineWatch(5.0, 60.0)
    watch.beat(STUCK_STEPS * 60.0 - 1)
    assert watch.look() is None
    watch.beat(STUCK_STEPS * 60.0)
    assert watch.look() == "stuck"


@given(
    st.lists(
        st.tuples(st.floats(0.0, STUCK_MIN_S, exclude_max=True), st.integers(0, LOOKS - 1)),
        max_size=30,
    )
)
def test_no_engine_that_beats_in_time_and_ends_its_steps_is_given_up(
    beats: list[tuple[float, int]],
) -> None:
    watch = EngineWatch(1.0, SHORT_S)
    for busy_s, silent_looks in beats:
        watch.beat(busy_s)
        assert looks(watch, silent_looks) == [None] * silent_looks
