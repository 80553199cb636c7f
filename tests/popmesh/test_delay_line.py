"""The pure link model: rate, delay, order and fairness, exact to the arithmetic."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popmesh.links.delay_line import (
    MAX_BUFFER_BYTES,
    MAX_PIECE_BYTES,
    MIN_PIECE_BYTES,
    SLACK_BUFFER_BYTES,
    DelayLine,
)
from popmesh.links.fair_queue import HORIZON_S, PRUNE_FLOWS, FairQueue

PUSHES = st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 200_000)), min_size=1, max_size=60)
RATES = st.floats(1e3, 1e9)
DELAYS = st.floats(0, 1)


@given(PUSHES, RATES, DELAYS)
def test_arrivals_never_beat_the_rate_or_the_delay(pushes, rate, delay):
    line = DelayLine(rate, delay)
    now, previous = 0.0, 0.0
    window_start, window_bytes = 0.0, 0
    for gap, nbytes in pushes:
        now += gap
        if now > line.free_at:  # the line idled: a new busy period starts
            window_start, window_bytes = now, 0
        window_bytes += nbytes
        arrival = line.push(now, nbytes)
        assert arrival >= previous
        assert arrival >= now + delay
        assert arrival == pytest.approx(window_start + window_bytes / rate + delay)
        previous = arrival


@given(PUSHES, RATES, DELAYS, RATES, DELAYS)
def test_order_survives_a_change_of_the_link(pushes, rate, delay, new_rate, new_delay):
    line = DelayLine(rate, delay)
    first = [line.push(0.0, n) for _, n in pushes]
    line.configure(new_rate, new_delay)
    second = [line.push(0.0, n) for _, n in pushes]
    assert first + second == sorted(first + second)


def test_a_late_push_uses_the_time_the_line_was_idle():
    line = DelayLine(1000.0, 0.0)
    line.push(10.0, 1000)
    assert line.push(5.0, 1000) == 12.0  # busy until 11: no credit for the past before that
    idle = DelayLine(1000.0, 0.0)
    assert idle.push(5.0, 1000) == 6.0  # even if the clock already shows 7


@pytest.mark.parametrize(("rate", "delay"), [(0.0, 0.1), (-1.0, 0.1), (1.0, -0.1)])
def test_impossible_links_are_refused(rate, delay):
    with pytest.raises(ValueError, match="impossible"):
        DelayLine(rate, delay)


def test_buffer_is_the_bandwidth_delay_product_within_bounds():
    assert DelayLine(125e6, 0.05).buffer_bytes == 12_500_000 + SLACK_BUFFER_BYTES
    assert DelayLine(1e6, 0.0).buffer_bytes == SLACK_BUFFER_BYTES
    assert DelayLine(1e10, 1.0).buffer_bytes == MAX_BUFFER_BYTES


ITEMS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 50_000), st.floats(0, 0.01)), max_size=80
)


@given(ITEMS, st.floats(1e5, 1e8))
def test_fair_queue_loses_nothing_and_keeps_each_flows_order(items, rate):
    queue: FairQueue[str, int] = FairQueue(DelayLine(rate, 0.01))
    now = 0.0
    out: list[tuple[float, str, int]] = []
    for number, (flow, nbytes, gap) in enumerate(items):
        now += gap
        queue.offer(flow, nbytes, number, now)
        out += queue.commit(now)
    while (wake_at := queue.next_deadline()) is not None:
        now = max(now, wake_at)
        out += queue.commit(now)
    assert [t for t, _, _ in out] == sorted(t for t, _, _ in out)
    for name in "abc":
        expected = [n for n, (flow, _, _) in enumerate(items) if flow == name]
        assert [n for _, flow, n in out if flow == name] == expected


def test_a_small_message_does_not_wait_behind_a_bulk_flow():
    rate = 1e6  # 1 MB/s: the bulk below needs one second
    queue: FairQueue[str, str] = FairQueue(DelayLine(rate, 0.0))
    for _ in range(100):
        queue.offer("kv", 10_000, "piece", 0.0)
    queue.commit(0.0)
    queue.offer("step", 100, "token", 0.1)
    now, arrival = 0.1, None
    while arrival is None:
        for at, _, item in queue.commit(now):
            arrival = at if item == "token" else arrival
        now = max(now, queue.next_deadline() or now)
    assert arrival <= 0.1 + HORIZON_S + 2 * 10_000 / rate


def test_busy_flows_share_the_rate_in_bytes_not_in_items():
    queue: FairQueue[str, int] = FairQueue(DelayLine(1e6, 0.0))
    for _ in range(400):
        queue.offer("small", 1_000, 1_000, 0.0)
    for _ in range(40):
        queue.offer("large", 10_000, 10_000, 0.0)
    sent: dict[str, int] = defaultdict(int)
    now = 0.0
    while sum(sent.values()) < 400_000:
        for _, flow, nbytes in queue.commit(now):
            sent[flow] += nbytes
        now = queue.next_deadline() or now
    assert abs(sent["small"] - sent["large"]) <= 20_000


def test_an_idle_spell_does_not_hold_a_tick_against_the_rate():
    """A timer that comes late commits what the line could have sent meanwhile."""
    queue: FairQueue[str, int] = FairQueue(DelayLine(1e6, 0.0))
    for number in range(10):
        queue.offer("kv", 1_000, number, 0.0)
    assert len(queue.commit(0.0)) == 2  # what fits the horizon of 1 ms, and the one that crosses it
    assert len(queue.commit(0.1)) == 8
    assert queue.next_deadline() is None


def test_tags_of_gone_flows_are_dropped_while_the_line_stays_busy():
    queue: FairQueue[int, int] = FairQueue(DelayLine(1e6, 0.0))
    now = 0.0
    for flow in range(4 * PRUNE_FLOWS):
        queue.offer(flow, 100, flow, now)
        queue.offer(flow, 100, flow, now)
        now += 0.00019
        queue.commit(now)
    assert len(queue) > 0
    assert len(queue._finish) <= PRUNE_FLOWS + len(queue) + 1


def test_a_held_line_has_no_claim_on_the_time_it_was_held():
    line = DelayLine(1000.0, 0.5)
    line.push(0.0, 1000)
    line.hold(10.0)
    assert line.push(2.0, 1000) == 11.5
    line.hold(3.0)
    assert line.free_at == 11.0


def test_a_forgotten_flow_is_gone_and_the_others_keep_their_order():
    queue: FairQueue[str, int] = FairQueue(DelayLine(1e9, 0.0))
    for number in range(30):
        queue.offer("abc"[number % 3], 1_000, number, 0.0)
    queue.forget("b")
    queue.offer("b", 1_000, 99, 0.0)
    out = [item for _, _, item in queue.commit(1.0)]
    assert [n for n in out if n % 3 == 0 and n != 99] == list(range(0, 30, 3))
    assert [n for n in out if n % 3 == 2] == list(range(2, 30, 3))
    assert [n for n in out if n % 3 == 1] == []
    assert 99 in out


@pytest.mark.parametrize(
    ("rate", "piece"), [(12.5e6, 16_250), (1e9, MAX_PIECE_BYTES), (1e4, MIN_PIECE_BYTES)]
)
def test_pieces_are_what_a_tick_carries(rate, piece):
    assert DelayLine(rate, 0.0).piece_bytes == piece
