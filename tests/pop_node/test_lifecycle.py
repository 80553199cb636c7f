"""Node lifecycle: doors open late, engines come back, a drain ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.lifecycle import (
    MAX_AWAITED_FAILURES,
    READY_WITHIN_S,
    RESTART_FIRST_S,
    RESTART_MAX_S,
    STABLE_AFTER_S,
    AnnounceDrain,
    DrainRequested,
    EndEngine,
    EngineExited,
    EngineReady,
    NodeLifecycle,
    OpenDoors,
    Shutdown,
    Started,
    StartEngine,
    StreamsLeft,
    Tick,
    Unwant,
    Want,
)


def serving() -> NodeLifecycle:
    node = NodeLifecycle(("a", "b"))
    assert node.handle(Started(), 0.0) == [StartEngine("a"), StartEngine("b")]
    assert node.handle(EngineReady("a"), 1.0) == []
    assert node.handle(EngineReady("b"), 2.0) == [OpenDoors()]
    assert node.state == "serving"
    return node


def test_doors_open_once_every_engine_is_ready():
    node = serving()
    node.handle(EngineExited("a"), 3.0)
    node.handle(Tick(), 4.0)
    assert node.handle(EngineReady("a"), 5.0) == []


def test_a_crashed_engine_restarts_with_growing_delay():
    node = serving()
    now, delays = 10.0, []
    for _ in range(10):
        node.handle(EngineExited("a"), now)
        deadline = node.next_deadline()
        assert deadline is not None
        delays.append(deadline - now)
        assert node.handle(Tick(), deadline - 1e-6) == []
        assert node.handle(Tick(), deadline) == [StartEngine("a")]
        now = deadline
    assert delays[0] == RESTART_FIRST_S
    assert delays == sorted(delays)
    assert delays[-1] == pytest.approx(RESTART_MAX_S)


def test_the_delay_falls_back_after_a_stable_minute():
    node = serving()
    node.handle(EngineExited("a"), 3.0)
    node.handle(Tick(), 10.0)
    node.handle(EngineReady("a"), 11.0)
    later = 11.0 + STABLE_AFTER_S
    node.handle(EngineExited("a"), later)
    assert node.next_deadline() == later + RESTART_FIRST_S


def test_the_doors_wait_no_more_for_an_engine_that_fails_again_and_again():
    node = NodeLifecycle(("a", "b"))
    node.handle(Started(), 0.0)
    for failure in range(1, MAX_AWAITED_FAILURES):
        assert node.handle(EngineExited("a"), failure) == []
    node.handle(EngineReady("b"), 5.0)
    assert node.state == "starting"
    assert node.handle(EngineExited("a"), 6.0) == [OpenDoors()]
    assert node.next_deadline() is not None  # it is tried on
    node.handle(EngineExited("b"), 7.0)
    assert node.state == "serving"


def test_the_doors_stay_closed_where_nobody_serves():
    node = NodeLifecycle(("a",), later=("b",))
    node.handle(Started(), 0.0)
    node.handle(Want("b"), 0.0)
    for failure in range(2 * MAX_AWAITED_FAILURES):
        assert node.handle(EngineExited("a"), failure) == []
        assert node.handle(EngineExited("b"), failure) == []
    assert node.handle(EngineReady("b"), 20.0) == [OpenDoors()]


def test_drain_ends_with_the_last_stream():
    node = serving()
    assert node.handle(DrainRequested(30.0), 5.0) == [AnnounceDrain()]
    assert node.handle(StreamsLeft(2), 6.0) == []
    assert node.handle(StreamsLeft(0), 7.0) == [Shutdown()]
    assert node.next_deadline() is None
    assert node.handle(EngineExited("a"), 8.0) == []


def test_no_engine_starts_again_during_a_drain():
    node = serving()
    node.handle(EngineExited("a"), 4.0)
    node.handle(DrainRequested(30.0), 4.1)
    node.handle(EngineExited("b"), 4.2)
    assert node.next_deadline() == 34.1
    assert node.handle(Tick(), 20.0) == []


def test_drain_ends_at_its_timeout():
    node = serving()
    node.handle(DrainRequested(30.0), 5.0)
    assert node.next_deadline() == 35.0
    assert node.handle(Tick(), 35.0) == [Shutdown()]


def test_an_engine_that_does_not_become_ready_is_ended_and_started_again():
    node = NodeLifecycle(("a", "b"))
    node.handle(Started(), 0.0)
    node.handle(EngineReady("b"), 1.0)
    assert node.next_deadline() == READY_WITHIN_S
    assert node.handle(Tick(), READY_WITHIN_S - 1e-6) == []
    assert node.handle(Tick(), READY_WITHIN_S) == [EndEngine("a")]
    assert node.handle(Tick(), READY_WITHIN_S + 1) == []  # it is told once
    node.handle(EngineExited("a"), READY_WITHIN_S + 2)
    again = READY_WITHIN_S + 2 + RESTART_FIRST_S
    assert node.handle(Tick(), again) == [StartEngine("a")]
    assert node.next_deadline() == again + READY_WITHIN_S
    assert node.handle(EngineReady("a"), again + 5) == [OpenDoors()]
    assert node.next_deadline() is None


def test_a_start_that_fails_again_and_again_backs_off():
    node = NodeLifecycle(("a",))
    node.handle(Started(), 0.0)
    now, waits = 0.0, []
    for _ in range(4):
        now = node.next_deadline()
        assert node.handle(Tick(), now) == [EndEngine("a")]
        node.handle(EngineExited("a"), now)
        waits.append(node.next_deadline() - now)
        now = node.next_deadline()
        node.handle(Tick(), now)
    assert waits == [RESTART_FIRST_S * 2**n for n in range(4)]


def test_drain_while_starting_stops_at_once():
    node = NodeLifecycle(("a",))
    node.handle(Started(), 0.0)
    assert node.handle(DrainRequested(30.0), 1.0) == [Shutdown()]


def test_doors_open_at_once_where_nobody_is_waited_for():
    node = NodeLifecycle(())
    assert node.handle(Started(), 0.0) == [OpenDoors()]
    assert node.handle(Want("a"), 1.0) == [StartEngine("a")]
    assert node.handle(Want("a"), 1.0) == []
    assert node.handle(EngineReady("a"), 2.0) == []
    node.handle(EngineExited("a"), 3.0)
    assert node.handle(Tick(), 3.0 + RESTART_FIRST_S) == [StartEngine("a")]


def test_doors_wait_for_engines_that_begin_later():
    node = NodeLifecycle(("a",), later=("b",))
    assert node.handle(Started(), 0.0) == [StartEngine("a")]
    assert node.handle(EngineReady("a"), 1.0) == []
    assert node.handle(Want("b"), 2.0) == [StartEngine("b")]
    assert node.handle(EngineReady("b"), 3.0) == [OpenDoors()]


def test_an_engine_that_is_not_wanted_any_more_is_not_started_again():
    node = serving()
    node.handle(EngineExited("a"), 3.0)
    assert node.handle(Unwant("a"), 3.1) == []
    assert node.next_deadline() is None
    node.handle(Unwant("b"), 4.0)
    node.handle(EngineExited("b"), 4.1)
    assert node.next_deadline() is None
    assert node.handle(Want("a"), 5.0) == [StartEngine("a")]


def test_doors_do_not_wait_for_an_engine_that_was_given_up():
    node = NodeLifecycle(("a", "b"))
    node.handle(Started(), 0.0)
    assert node.handle(EngineReady("b"), 1.0) == []
    assert node.handle(Unwant("a"), 2.0) == [OpenDoors()]
    assert node.handle(DrainRequested(9.0), 3.0) == [AnnounceDrain()]
    assert node.handle(Want("a"), 4.0) == []


EVENTS = st.sampled_from(
    [
        Want("a"),
        Unwant("a"),
        Want("b"),
        EngineReady("a"),
        EngineExited("a"),
        DrainRequested(9.0),
        StreamsLeft(0),
        StreamsLeft(3),
        Tick(),
    ]
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 20)), max_size=60))
def test_any_order_of_events_stops_at_most_once(events):
    node, now, stops, doors = NodeLifecycle(("a",)), 0.0, 0, 0
    node.handle(Started(), now)
    for event, gap_s in events:
        now += gap_s
        effects = node.handle(event, now)
        assert stops == 0 or effects == []
        stops += effects.count(Shutdown())
        doors += effects.count(OpenDoors())
    assert stops <= 1
    assert doors <= 1
