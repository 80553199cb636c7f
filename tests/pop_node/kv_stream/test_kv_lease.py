"""A computed prompt keeps its blocks for a decode node that has no room, but not for ever."""

from __future__ import annotations

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.liveness import MIN_WAIT_S, WAIT_RTTS
from tests.pop_node.kv_stream.kv_content import Plan
from tests.pop_node.kv_stream.kv_ends import LINK
from tests.pop_node.kv_stream.kv_pair import Pair

T = bytes(range(16))


def computed(**changes) -> tuple[Pair, Plan]:
    """A transfer whose prompt is computed, at a decode node that has not allocated its blocks."""
    pair, plan = Pair(), Plan(T, **changes)
    pair.expect(plan)
    pair.open(plan)
    pair.run()
    pair.wait(3 * MIN_WAIT_S)  # computing takes as long as it takes
    assert len(pair.sender) == 1
    pair.commit(plan)
    return pair, plan


def test_a_computed_prompt_waits_for_room_for_one_lease():
    pair, _ = computed()
    pair.wait(0.99 * MIN_WAIT_S)
    assert not pair.errors_p
    pair.wait(0.02 * MIN_WAIT_S)
    assert (pair.errors_p[T].code, pair.errors_p[T].retryable) == ("transfer_timeout", True)
    pair.run()
    assert pair.errors_d, "the decode node is told"
    pair.check_at_rest()


def test_the_lease_is_twenty_round_trips_on_a_long_path():
    pair, _ = computed()
    pair.p(ev.LinkRtt(LINK, 1.0))
    pair.wait(0.99 * WAIT_RTTS)
    assert not pair.errors_p
    pair.wait(0.02 * WAIT_RTTS)
    assert T in pair.errors_p


def test_a_grant_within_the_lease_is_progress():
    pair, plan = computed()
    pair.wait(0.9 * MIN_WAIT_S)
    pair.allocate(plan)
    pair.run()
    assert T in pair.reports
    pair.check_at_rest()


def test_credit_that_comes_slowly_is_progress():
    """A long prompt, a decode node that imports a piece every few seconds."""
    pair, plan = computed(prompt_tokens=60, deadline=10_000.0)
    pair.allocate(plan)
    moves = (pair.stage_one, pair.write_one, pair.deliver_up, pair.finish_one, pair.deliver_down)
    for _ in range(1000):
        while any(move() for move in moves):
            pass
        if not pair.import_one():
            break
        pair.wait(0.8 * MIN_WAIT_S)
    assert not pair.errors_p
    assert pair.now > 10 * MIN_WAIT_S, "it took many leases in all"
    pair.run()
    assert T in pair.reports
