"""How long a transfer whose connection broke or fell silent is waited for."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import Ack
from pop_node.kv_stream.liveness import DIAL_RTTS, MIN_DIAL_S, MIN_WAIT_S, WAIT_RTTS
from pop_node.kv_stream.outgoing import REDIAL_MAX_S
from tests.pop_node.kv_stream.kv_content import SPEC, Plan
from tests.pop_node.kv_stream.kv_ends import LINK
from tests.pop_node.kv_stream.kv_moves import T, in_flight, start, step
from tests.pop_node.kv_stream.kv_pair import Pair
from wire.errors import PeerError


@pytest.mark.parametrize("rtt_s", [0.01, 0.5])
def test_both_sides_give_up_after_the_same_wait(rtt_s: float) -> None:
    pair, _ = in_flight()
    pair.p(ev.LinkRtt(LINK, rtt_s))
    pair.d(ev.ConnRtt(pair.conn, rtt_s))
    wait_s = max(MIN_WAIT_S, WAIT_RTTS * rtt_s)
    pair.can_dial = False
    pair.break_link()
    while pair.to_import:
        pair.import_one()
    pair.wait(wait_s - 0.01)
    assert not pair.ended_p
    assert not pair.ended_d
    pair.wait(0.02)
    assert pair.errors_p[T].code == pair.errors_d[T].code == "transfer_timeout"
    pair.check_at_rest()


@pytest.mark.parametrize("rtt_s", [0.01, 0.5])
def test_silence_was_waiting_and_leaves_time_for_one_dial_only(rtt_s: float) -> None:
    """The path died without a word: who noticed has waited its time already."""
    pair, _ = in_flight()
    pair.p(ev.LinkRtt(LINK, rtt_s))
    pair.d(ev.ConnRtt(pair.conn, rtt_s))
    pair.can_dial = False
    while pair.to_import:
        pair.import_one()
    pair.now = max(MIN_WAIT_S, WAIT_RTTS * rtt_s) - 0.01
    pair.break_link(is_silent=True)
    dial_s = max(MIN_DIAL_S, DIAL_RTTS * rtt_s)
    pair.wait(dial_s - 0.01)
    assert not pair.ended_p
    assert not pair.ended_d
    pair.wait(0.02)
    assert pair.errors_p[T].code == pair.errors_d[T].code == "transfer_timeout"
    pair.check_at_rest()


def test_a_dial_after_silence_that_reaches_the_peer_takes_the_transfer_up() -> None:
    """Perhaps only something between had forgotten the connection."""
    pair, plan = in_flight()
    pair.can_dial = False
    pair.now = MIN_WAIT_S
    pair.break_link(is_silent=True)
    pair.wait(MIN_DIAL_S / 2)
    pair.connect()
    pair.run()
    assert pair.committed == {T: plan.ids}
    assert pair.reports
    pair.check_at_rest()


def test_silence_while_the_prompt_is_computed_counts_as_well() -> None:
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    while pair.deliver_up() or pair.deliver_down():
        pass
    pair.can_dial = False
    pair.wait(3 * MIN_WAIT_S)  # pings were answered
    assert not pair.ended_p
    pair.break_link(is_silent=True)
    pair.wait(MIN_DIAL_S + 0.01)
    assert pair.errors_p[T].code == pair.errors_d[T].code == "transfer_timeout"


@pytest.mark.parametrize("stood_s", [0.0, 3.0, MIN_WAIT_S - 0.1])
def test_after_a_reset_the_wait_counts_from_the_last_acknowledgement(stood_s: float) -> None:
    pair, _ = in_flight()
    pair.can_dial = False
    pair.now = stood_s
    pair.break_link()
    until = max(MIN_WAIT_S, stood_s + MIN_DIAL_S)
    pair.wait(until - stood_s - 0.01)
    assert not pair.ended_p
    pair.wait(0.02)
    assert pair.errors_p[T].code == "transfer_timeout"


def test_after_a_reset_with_nothing_on_its_way_there_is_the_whole_wait() -> None:
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    while pair.deliver_up() or pair.deliver_down():
        pass
    pair.can_dial = False
    pair.now = 20.0
    pair.break_link()
    pair.wait(MIN_WAIT_S - 0.01)
    assert not pair.ended_p
    pair.wait(0.02)
    assert pair.errors_p[T].code == "transfer_timeout"


def test_dials_back_off_and_end_with_the_wait() -> None:
    pair, _ = in_flight()
    pair.dials.clear()
    pair.can_dial = False
    pair.break_link()
    while T not in pair.errors_p:
        if pair.dials and pair.dials[-1] == pair.now:  # every dial fails at once
            pair.p(ev.LinkDown(LINK, PeerError("cannot reach d")))
        at = pair.sender.next_deadline()
        assert at is not None
        assert at >= pair.now
        pair.wait(at - pair.now)
    gaps = [later - sooner for sooner, later in pairwise(pair.dials)]
    assert pair.dials[0] == 0.0
    assert gaps == sorted(gaps)
    assert max(gaps) <= REDIAL_MAX_S
    assert 5 < len(pair.dials) < 15
    assert pair.now == pytest.approx(MIN_WAIT_S)
    pair.check_at_rest()


def test_links_that_come_and_go_without_a_byte_are_no_progress() -> None:
    pair, _ = in_flight()
    pair.break_link()
    while not pair.ended_p:
        assert pair.now <= MIN_WAIT_S + REDIAL_MAX_S
        pair.break_link()
        pair.wait(REDIAL_MAX_S)
    assert pair.errors_p[T].code == "transfer_timeout"


def test_bytes_between_breaks_are_progress() -> None:
    """A path that breaks every second for half a minute, and carries a piece in between."""
    pair, plan = Pair(), Plan(T, prompt_tokens=80, deadline=300.0)
    start(pair, plan)
    while not pair.committed:
        acked = pair.receiver.counts.received_bytes
        while pair.receiver.counts.received_bytes == acked and not pair.committed:
            assert step(pair) or pair.committed
        while pair.deliver_down():
            pass
        if not pair.committed:
            pair.break_link()
            pair.wait(1.0)
    assert pair.now > 2 * MIN_WAIT_S
    pair.run()
    assert not pair.errors_p
    pair.check_at_rest()


def test_a_slow_but_moving_transfer_lives() -> None:
    """One percent of 20 Mbit/s: a slot takes ten seconds, and is all there is to see."""
    pair, plan = Pair(), Plan(T, deadline=10_000.0)
    start(pair, plan)
    while not pair.committed:
        while (
            pair.stage_one()
            or pair.write_one()
            or pair.deliver_up()
            or pair.import_one()
            or pair.deliver_down()
        ):
            pass
        if pair.arriving:
            slot, _, payload = pair.arriving[0]
            for part in range(1, 6):
                pair.wait(2.0)
                pair.d(ev.DataMoved(slot, len(payload) * part // 6))
                assert isinstance(pair.down[-1], Ack)
                while pair.deliver_down():
                    pass
            assert pair.finish_one()
    pair.run()
    assert pair.now > 10 * MIN_WAIT_S
    assert not pair.errors_p
    assert pair.reports[T].kv_bytes == plan.total * SPEC.token_bytes
    pair.check_at_rest()


def test_a_transfer_that_stands_still_dies_on_both_sides() -> None:
    pair, _ = in_flight()
    while pair.to_import:
        pair.import_one()
    pair.up.clear()
    pair.arriving.clear()
    pair.wait(MIN_WAIT_S + 0.01)
    assert pair.errors_p[T].code == "transfer_timeout"
    pair.deliver_up()  # Abort
    assert pair.errors_d[T].code == "transfer_timeout"
