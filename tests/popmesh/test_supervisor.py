"""The restart policy, event by event and against random lives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popmesh.launcher.supervisor import (
    CONFIG_EXIT_CODE,
    FIRST_DELAY_S,
    GRACE_S,
    MAX_DELAY_S,
    MAX_FIRST_TRIES,
    STABLE_S,
    ChildMachine,
    Exited,
    GaveUp,
    Healthy,
    Kill,
    Restarting,
    Spawn,
    Start,
    StopRequested,
    Terminate,
    Tick,
)


def running(*, healthy: bool = True) -> ChildMachine:
    machine = ChildMachine()
    assert machine.handle(Start(), 0.0) == [Spawn()]
    if healthy:
        machine.handle(Healthy(), 0.0)
    return machine


def test_a_crash_is_followed_by_a_restart_after_the_backoff():
    machine = running()
    assert machine.handle(Exited(-9), 1.0) == [Restarting(-9, FIRST_DELAY_S)]
    assert machine.next_deadline() == 1.0 + FIRST_DELAY_S
    assert machine.handle(Tick(), 1.0 + FIRST_DELAY_S / 2) == []
    assert machine.handle(Tick(), 1.0 + FIRST_DELAY_S) == [Spawn()]
    assert machine.next_deadline() is None


def test_the_backoff_doubles_up_to_its_bound_and_never_ends():
    machine, now, delays = running(), 0.0, []
    for _ in range(30):
        (effect,) = machine.handle(Exited(1), now)
        delays.append(effect.delay_s)
        now += effect.delay_s
        machine.handle(Tick(), now)
    assert delays[:4] == [FIRST_DELAY_S * 2**n for n in range(4)]
    assert delays[-1] == MAX_DELAY_S


def test_a_long_run_makes_the_next_crash_the_first():
    machine, now = running(), 0.0
    for _ in range(5):
        (effect,) = machine.handle(Exited(1), now)
        now += effect.delay_s
        machine.handle(Tick(), now)
    assert machine.handle(Exited(1), now + STABLE_S) == [Restarting(1, FIRST_DELAY_S)]


def test_a_child_that_never_worked_is_given_up():
    machine, now = running(healthy=False), 0.0
    for _ in range(MAX_FIRST_TRIES - 1):
        (effect,) = machine.handle(Exited(1), now)
        now += effect.delay_s
        machine.handle(Tick(), now)
    assert machine.handle(Exited(1), now) == [GaveUp(1, MAX_FIRST_TRIES)]
    assert machine.state == "gone"


@pytest.mark.parametrize("healthy", [False, True])
def test_a_refused_configuration_is_not_tried_again_unless_it_worked_before(healthy):
    (effect,) = running(healthy=healthy).handle(Exited(CONFIG_EXIT_CODE), 1.0)
    assert isinstance(effect, Restarting if healthy else GaveUp)


def test_a_stop_is_polite_first():
    machine = running()
    assert machine.handle(StopRequested(), 5.0) == [Terminate()]
    assert machine.handle(Exited(0), 6.0) == []
    assert machine.state == "gone"


def test_a_child_that_ignores_the_stop_is_killed():
    machine = running()
    machine.handle(StopRequested(), 5.0)
    assert machine.handle(Tick(), 5.0 + GRACE_S) == [Kill()]
    assert machine.next_deadline() is None
    machine.handle(Exited(-9), 5.1 + GRACE_S)
    assert machine.state == "gone"


def test_a_stop_during_the_backoff_starts_nothing():
    machine = running()
    machine.handle(Exited(1), 0.0)
    assert machine.handle(StopRequested(), 0.1) == []
    assert machine.state == "gone"
    assert machine.handle(Tick(), 10.0) == []


def test_a_stop_before_the_start_wins():
    machine = ChildMachine()
    machine.handle(StopRequested(), 0.0)
    assert machine.handle(Start(), 0.0) == []


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["exit", "refuse", "healthy", "tick", "stop", "start"]), st.floats(0, 40)
    ),
    max_size=40,
)


@given(EVENTS)
def test_whatever_happens_one_process_runs_at_a_time_and_none_after_the_end(events):
    machine, now = ChildMachine(), 0.0
    alive, ended, killed = False, False, False
    for kind, gap in [("start", 0.0), *events]:
        now += gap
        if kind in ("exit", "refuse"):
            if not alive:
                continue
            alive = False
            event = Exited(1 if kind == "exit" else CONFIG_EXIT_CODE)
        else:
            event = {"healthy": Healthy(), "tick": Tick(), "stop": StopRequested(),
                     "start": Start()}[kind]  # fmt: skip
        for effect in machine.handle(event, now):
            if isinstance(effect, Spawn):
                assert not alive
                assert not ended
                alive = True
            if isinstance(effect, Terminate | Kill):
                assert alive
                killed = killed or isinstance(effect, Kill)
        ended = ended or machine.state in ("stopping", "gone")
        assert not (machine.state == "gone" and alive)
        assert (machine.next_deadline() is not None) == (
            machine.state == "waiting" or (machine.state == "stopping" and not killed)
        )
