"""The watch machine: scripted moments first, then any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.backoff import BASE_S, CAP_S, backoff_s
from registry.entries import ServiceEntry, Snapshot, Status
from registry.watch import (
    HOLD_S,
    MIN_GAP_S,
    STABLE_S,
    WAIT_S,
    Answered,
    Effect,
    Event,
    Failed,
    Publish,
    Query,
    Stale,
    Start,
    Tick,
    Watch,
)

NO_JITTER = 0.0


def entry(service_id: str, status: Status = "passing", **meta: str) -> ServiceEntry:
    return ServiceEntry(service_id, "s", "192.0.2.1", 1, meta, status)


def snapshot(index: int, *ids: str) -> Snapshot:
    return Snapshot(index, tuple(entry(service_id) for service_id in ids))


def ids(effect: Effect) -> list[str]:
    assert isinstance(effect, Publish)
    return [each.service_id for each in effect.snapshot.entries]


def started(index: int = 7, *service_ids: str) -> Watch:
    """A watch at time 0 that has its first answer and asks the second question."""
    watch = Watch()
    assert watch.handle(Start(), 0.0) == [Query(0, WAIT_S)]
    first = snapshot(index, *service_ids)
    assert watch.handle(Answered(first), 0.0) == [Publish(first)]
    assert watch.next_deadline() == MIN_GAP_S
    assert watch.handle(Tick(), MIN_GAP_S) == [Query(index, WAIT_S)]
    return watch


def test_the_first_empty_answer_is_a_view_too() -> None:
    assert started(1).view == snapshot(1)


def test_news_is_published_once_and_the_next_question_follows_at_once() -> None:
    watch = started(7, "a")
    assert watch.handle(Answered(snapshot(9, "a", "b")), 5.0) == [
        Publish(snapshot(9, "a", "b")),
        Query(9, WAIT_S),
    ]


def test_an_index_that_moves_without_news_publishes_nothing() -> None:
    watch = started(7, "a")
    assert watch.handle(Answered(snapshot(8, "a")), 5.0) == [Query(8, WAIT_S)]
    assert watch.view == snapshot(7, "a")


def test_instances_that_leave_in_order_leave_the_view_at_once() -> None:
    watch = started(7, "a", "b")
    publish, _ = watch.handle(Answered(snapshot(8, "b")), 5.0)
    assert ids(publish) == ["b"]


def test_changes_in_quick_succession_are_not_chased_one_by_one() -> None:
    watch = started(7, "a")  # asked at MIN_GAP_S
    at = 1.2 * MIN_GAP_S
    assert watch.handle(Answered(snapshot(8, "a", "b")), at) == [Publish(snapshot(8, "a", "b"))]
    assert watch.next_deadline() == pytest.approx(2 * MIN_GAP_S)


def test_a_failure_keeps_the_view_says_its_age_and_starts_over() -> None:
    watch = started(7, "a")
    assert watch.handle(Failed(NO_JITTER), 12.0) == [Stale(12.0)]
    assert watch.view == snapshot(7, "a")
    assert watch.next_deadline() == 12.0 + BASE_S
    assert watch.handle(Tick(), 12.0 + BASE_S) == [Query(0, WAIT_S)]
    assert watch.handle(Failed(NO_JITTER), 13.0) == [Stale(13.0)]
    assert watch.next_deadline() == 13.0 + 2 * BASE_S


def test_without_any_answer_yet_the_age_is_unknown() -> None:
    watch = Watch()
    watch.handle(Start(), 0.0)
    assert watch.handle(Failed(NO_JITTER), 3.0) == [Stale(None)]
    assert watch.view is None


def test_a_registry_that_forgot_everything_empties_the_view_only_after_a_while() -> None:
    watch = started(7, "a", "b")
    watch.handle(Failed(NO_JITTER), 10.0)
    watch.handle(Tick(), 11.0)
    assert watch.handle(Answered(snapshot(1)), 11.0) == []  # both are held: no news
    (query,) = watch.handle(Tick(), 12.0)
    assert query == Query(1, WAIT_S)
    back = Snapshot(3, (entry("a", "warning"),))
    publish, _ = watch.handle(Answered(back), 13.0)
    assert isinstance(publish, Publish)
    assert publish.snapshot == Snapshot(3, (entry("a", "warning"), entry("b")))
    assert watch.next_deadline() == 11.0 + HOLD_S
    (publish,) = watch.handle(Tick(), 11.0 + HOLD_S)
    assert ids(publish) == ["a"]


def test_an_instance_that_came_back_and_then_leaves_is_gone_at_once() -> None:
    watch = started(7, "a", "b")
    watch.handle(Failed(NO_JITTER), 10.0)
    watch.handle(Tick(), 11.0)
    watch.handle(Answered(snapshot(1)), 11.0)
    watch.handle(Tick(), 11.5)
    watch.handle(Answered(snapshot(2, "a")), 12.0)
    publish, _ = watch.handle(Answered(snapshot(3)), 13.0)
    assert ids(publish) == ["b"]


def test_an_index_that_goes_backwards_starts_over_and_holds_too() -> None:
    watch = started(7, "a", "b")
    assert watch.handle(Answered(snapshot(2, "a")), 5.0) == [Query(0, WAIT_S)]
    assert watch.view == snapshot(7, "a", "b")
    assert watch.next_deadline() == 5.0 + HOLD_S


def test_a_registry_that_comes_and_goes_cannot_prolong_what_is_held() -> None:
    watch = started(7, "a", "b")
    now = 10.0
    while now < 10.0 + HOLD_S + 1.0:
        watch.handle(Failed(NO_JITTER), now)
        now += CAP_S
        assert Query(0, WAIT_S) in watch.handle(Tick(), now)
        watch.handle(Answered(snapshot(1, "a")), now)
        now += MIN_GAP_S
        watch.handle(Tick(), now)
    assert watch.view == Snapshot(1, (entry("a"),))


def test_the_backoff_is_forgiven_after_a_stable_while_only() -> None:
    watch = started(7, "a")
    for expected in (BASE_S, 2 * BASE_S, 4 * BASE_S):  # an answer in between changes nothing
        watch.handle(Failed(NO_JITTER), 10.0)
        assert watch.next_deadline() == pytest.approx(10.0 + expected)
        watch.handle(Tick(), 10.0 + expected)
        watch.handle(Answered(snapshot(7, "a")), 10.0)
        watch.handle(Tick(), 11.0)
    watch.handle(Answered(snapshot(7, "a")), 10.0 + STABLE_S)
    watch.handle(Failed(NO_JITTER), 30.0)
    assert watch.next_deadline() == 30.0 + BASE_S


@given(failures=st.integers(1, 10_000), jitter=st.floats(0, 1, exclude_max=True))
def test_the_backoff_grows_within_its_bounds(failures: int, jitter: float) -> None:
    assert BASE_S / 2 < backoff_s(failures, jitter) <= CAP_S
    assert backoff_s(failures, jitter) <= backoff_s(failures + 1, jitter)
    assert backoff_s(failures, jitter) <= backoff_s(failures, 0.0)


answers = st.builds(
    lambda index, present: Answered(snapshot(index, *sorted(present))),
    st.integers(1, 20),
    st.sets(st.sampled_from("abcd")),
)
outcomes = answers | st.builds(Failed, st.floats(0, 1, exclude_max=True))


@given(st.lists(st.tuples(outcomes, st.floats(0, 30)), max_size=40))
def test_in_any_order_of_events_the_view_is_right(script: list[tuple[Event, float]]) -> None:
    """One question at a time; nothing invented, nothing true left out, nothing held too long."""
    watch = Watch()
    now = 0.0
    out: Query | None = None
    published: Snapshot | None = None
    last: set[str] = set()
    last_seen: dict[str, float] = {}

    def feed(event: Event) -> None:
        nonlocal out, published
        for effect in watch.handle(event, now):
            match effect:
                case Query(index):
                    assert out is None, "two questions at a time"
                    assert index >= 0
                    assert not isinstance(event, Failed), "asked again without a pause"
                    out = effect
                case Publish(view):
                    assert published is None or published.entries != view.entries
                    published = view
                case Stale():
                    assert isinstance(event, Failed)
        assert watch.view == published

    feed(Start())
    for event, pause_s in script:
        while out is None:  # the shell sleeps until the deadline
            deadline = watch.next_deadline()
            assert deadline is not None, "the watch died"
            now = max(now, deadline)
            feed(Tick())
        deadline = watch.next_deadline()
        if deadline is not None and deadline <= now + pause_s:
            now = max(now, deadline)
            feed(Tick())
        now += pause_s
        before = now
        out = None
        if isinstance(event, Answered):
            gone = last - {each.service_id for each in event.snapshot.entries}
            last_seen.update(dict.fromkeys(gone, before))
            last = {each.service_id for each in event.snapshot.entries}
        feed(event)
        if published is not None:
            shown = {each.service_id for each in published.entries}
            assert last <= shown
            for service_id in shown - last:
                assert now < last_seen[service_id] + HOLD_S
