"""The keep machine against a simulated registry that fails, forgets and restarts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.backoff import BASE_S, CAP_S
from registry.entries import Registration, Status
from registry.keep import (
    CLOSE_WITHIN_S,
    Call,
    Close,
    Deregister,
    Done,
    Failed,
    Heartbeat,
    Keep,
    Register,
    SetMeta,
    SetStatus,
    Start,
    Tick,
    Unknown,
)

REGISTRATION = Registration("s:a", "s", "192.0.2.1", 1, {"draining": "no"}, 9.0, 60.0)
BEAT_S = 3.0
DRAINING = {"draining": "yes"}


def registered(now: float = 0.0) -> Keep:
    keep = Keep(REGISTRATION)
    assert keep.next_deadline() is None
    assert keep.handle(Start(), now) == Register(REGISTRATION, "passing")
    assert not keep.settled
    assert keep.handle(Done(), now) is None
    assert keep.settled
    return keep


def test_heartbeats_come_three_times_per_ttl_counted_from_their_sending() -> None:
    keep = registered()
    assert keep.next_deadline() == BEAT_S
    assert keep.handle(Tick(), BEAT_S - 0.1) is None
    assert keep.handle(Tick(), BEAT_S) == Heartbeat("passing", "")
    assert keep.next_deadline() is None
    assert keep.handle(Done(), BEAT_S + 1.0) is None
    assert keep.next_deadline() == 2 * BEAT_S


def test_an_instance_that_the_registry_forgot_is_registered_at_once() -> None:
    keep = registered()
    keep.handle(Tick(), BEAT_S)
    assert keep.handle(Unknown(0.0), BEAT_S) == Register(REGISTRATION, "passing")


def test_a_registry_that_forgets_again_and_again_is_asked_ever_more_rarely() -> None:
    keep = registered()
    keep.handle(Tick(), BEAT_S)
    keep.handle(Unknown(0.0), BEAT_S)
    keep.handle(Done(), BEAT_S)
    assert keep.handle(Tick(), 2 * BEAT_S) == Heartbeat("passing", "")
    assert keep.handle(Unknown(0.0), 2 * BEAT_S) is None
    assert keep.next_deadline() == pytest.approx(2 * BEAT_S + 2 * BASE_S)


def test_failures_back_off_and_a_success_forgives_them() -> None:
    keep = registered()
    now = BEAT_S
    assert keep.handle(Tick(), now) == Heartbeat("passing", "")
    for pause_s in (BASE_S, 2 * BASE_S, 4 * BASE_S):
        assert keep.handle(Failed(0.0), now) is None
        assert keep.next_deadline() == pytest.approx(now + pause_s)
        now += pause_s + 0.001
        assert keep.handle(Tick(), now) == Heartbeat("passing", "")
    keep.handle(Done(), now)
    assert keep.handle(Tick(), now + BEAT_S) is not None
    keep.handle(Failed(0.0), now + BEAT_S)
    assert keep.next_deadline() == pytest.approx(now + BEAT_S + BASE_S)


def test_new_metadata_is_registered_at_once_with_the_present_health() -> None:
    keep = registered()
    assert keep.handle(SetStatus("warning", "hot"), 1.0) == Heartbeat("warning", "hot")
    keep.handle(Done(), 1.0)
    call = keep.handle(SetMeta(DRAINING), 1.5)
    assert isinstance(call, Register)
    assert (call.registration.meta, call.status) == (DRAINING, "warning")
    assert not keep.settled
    assert keep.handle(Done(), 1.6) == Heartbeat("warning", "hot"), "the note goes with a heartbeat"
    keep.handle(Done(), 1.7)
    assert keep.settled


def test_metadata_that_changes_during_a_call_follows_it() -> None:
    keep = Keep(REGISTRATION)
    keep.handle(Start(), 0.0)
    assert keep.handle(SetMeta(DRAINING), 0.1) is None
    call = keep.handle(Done(), 0.2)
    assert isinstance(call, Register)
    assert call.registration.meta == DRAINING


def test_closing_deregisters_after_the_call_that_is_out() -> None:
    keep = registered()
    keep.handle(Tick(), BEAT_S)
    assert keep.handle(Close(), BEAT_S) is None
    assert keep.handle(Done(), BEAT_S + 0.1) == Deregister()
    assert not keep.ended
    assert keep.handle(Done(), BEAT_S + 0.2) is None
    assert keep.ended
    assert keep.next_deadline() is None


def test_closing_before_the_start_or_the_first_call_ends_at_once() -> None:
    keep = Keep(REGISTRATION)
    assert keep.handle(Close(), 0.0) is None
    assert keep.ended
    assert keep.handle(Start(), 1.0) is None


def test_a_registration_of_unknown_fate_is_deregistered_too() -> None:
    keep = Keep(REGISTRATION)
    keep.handle(Start(), 0.0)
    keep.handle(Failed(0.0), 0.1)
    assert keep.handle(Close(), 0.1) == Deregister()


def test_closing_tries_again_and_gives_up_in_time() -> None:
    keep = registered()
    assert keep.handle(Close(), 1.0) == Deregister()
    assert keep.handle(Failed(0.0), 1.1) is None
    assert keep.handle(Tick(), 1.1 + BASE_S) == Deregister()
    assert keep.next_deadline() == 1.0 + CLOSE_WITHIN_S
    assert keep.handle(Close(), 2.0) is None, "closing twice does not prolong it"
    assert keep.handle(Tick(), 1.0 + CLOSE_WITHIN_S) is None
    assert keep.ended
    assert keep.handle(Failed(0.0), 9.0) is None


class SimulatedRegistry:
    """Holds at most one instance and applies calls; a failed call may have been applied or not."""

    def __init__(self) -> None:
        self.meta: dict[str, str] | None = None
        self.status: Status | None = None

    def apply(self, call: Call) -> bool:
        match call:
            case Register(registration, status):
                self.meta, self.status = dict(registration.meta), status
            case Heartbeat(status):
                if self.meta is None:
                    return False
                self.status = status
            case Deregister():
                self.meta = self.status = None
        return True


steps = st.lists(
    st.tuples(
        st.sampled_from(["ok", "lost", "applied but no answer", "forget", "meta", "status"]),
        st.floats(0.001, 4.0),
        st.floats(0, 1, exclude_max=True),
    ),
    max_size=40,
)


@given(steps)
def test_whatever_happened_the_registry_ends_up_with_what_is_wanted(
    script: list[tuple[str, float, float]],
) -> None:
    registry = SimulatedRegistry()
    keep = Keep(REGISTRATION)
    now = 0.0
    meta, status = dict(REGISTRATION.meta), "passing"
    call = keep.handle(Start(), now)

    def answer(outcome: str, jitter: float) -> Call | None:
        assert call is not None
        if outcome == "lost":
            return keep.handle(Failed(jitter), now)
        known = registry.apply(call)
        if outcome == "applied but no answer":
            return keep.handle(Failed(jitter), now)
        return keep.handle(Done() if known else Unknown(jitter), now)

    def advance(seconds: float) -> None:
        nonlocal now, call
        now += seconds
        if call is None:
            call = keep.handle(Tick(), now)

    for number, (what, pause_s, jitter) in enumerate(script):
        advance(pause_s)
        fresh: Call | None = None
        if what == "forget":
            registry.meta = registry.status = None
        elif what == "meta":
            meta = {"draining": str(number)}
            fresh = keep.handle(SetMeta(meta), now)
        elif what == "status":
            status = ("passing", "warning", "critical")[number % 3]
            fresh = keep.handle(SetStatus(status, ""), now)
        elif call is not None:
            call = answer(what, jitter)
        if fresh is not None:
            assert call is None, "two calls at a time"
            call = fresh

    # From now on the registry is well: everything is in place within one heartbeat and a backoff,
    # twice, because the first heartbeat may be the one that finds out.
    end = now + 2 * (BEAT_S + CAP_S)
    while now < end:
        if call is not None:
            call = answer("ok", 0.0)
        else:
            deadline = keep.next_deadline()
            assert deadline is not None, "the keeper died"
            advance(max(0.0, deadline - now))
    assert (registry.meta, registry.status) == (meta, status)
    assert keep.settled or call is not None

    while call is not None:
        call = answer("ok", 0.0)
    call = keep.handle(Close(), now)
    while call is not None:
        call = answer("ok", 0.0)
    assert keep.ended
    assert registry.meta is None
