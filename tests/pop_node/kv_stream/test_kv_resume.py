"""A transfer whose connection breaks goes on where it was, or ends in time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import Commit, Data, Deny, Done, Grant, Open
from pop_node.kv_stream.receiver import Receiver
from tests.pop_node.kv_stream.kv_content import SPEC, Plan
from tests.pop_node.kv_stream.kv_ends import CONN, LINK, SLOT_BYTES
from tests.pop_node.kv_stream.kv_moves import T, in_flight, start, step
from tests.pop_node.kv_stream.kv_pair import Pair
from wire.errors import PeerError

LOST = PeerError("gone", code="link_lost")


# ---- a break at any moment ----

WAYS = ["noticed", "unnoticed", "noticed late", "slow agent"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("again_after", [0, 1, 2, 3, 5, 9, 17])
def test_a_break_at_any_moment_costs_no_byte(way: str, again_after: int) -> None:
    """Break the link at the Nth effect, and once more soon after, for N = 1, 2, ..."""
    for n in range(2000):
        pair = Pair(is_slow=way == "slow agent")
        plans = [Plan(bytes([k]) * 16, 10 + k, have_tokens=3 * k) for k in range(2)]
        breaks = 0

        def strike(pair: Pair = pair) -> None:
            nonlocal breaks
            breaks += 1
            pair.break_link(d_notices=way in ("noticed", "slow agent"))
            if way == "noticed late":
                pair.run_moves(3)
                pair.notice()
            if breaks == 1 and again_after:
                pair.effects_left = again_after

        pair.strike = strike
        pair.effects_left = n
        start(pair, *plans)
        pair.run()
        pair.rest_until_dialled()
        assert not pair.errors_p, (n, pair.errors_p)
        assert not pair.errors_d, (n, pair.errors_d)
        assert set(pair.committed) == set(pair.reports) == {plan.transfer for plan in plans}
        needed = sum((plan.total - plan.have_tokens) * SPEC.token_bytes for plan in plans)
        if way != "noticed late":  # whose new pieces may fall behind a hole
            assert pair.receiver.counts.received_bytes == needed, "a byte that was here came again"
        assert sum(report.kv_bytes for report in pair.reports.values()) == needed
        pair.notice()
        pair.check_at_rest()
        if not breaks:
            assert n > 50
            return
    raise AssertionError("the sweep did not end")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2**16)), max_size=200),
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
)
def test_any_number_of_breaks_in_any_order(moves: list[tuple[int, int]], sizes: list[int]) -> None:
    pair = Pair(is_slow=True)
    plans = [Plan(bytes([n]) * 16, size, size * n // 4) for n, size in enumerate(sizes)]
    start(pair, *plans)
    for move, arg in moves:
        match move:
            case 0 | 1:
                pair.stage_one()
            case 2:
                pair.hear_staged()
            case 3:
                pair.write_one()
            case 4 | 5:
                pair.deliver_up(arg if arg % 3 == 0 else 0)  # two stripes: frames overtake
            case 6 | 7:
                pair.finish_one(arg)
            case 8:
                pair.import_one(arg)
            case 9:
                pair.deliver_down()
            case 10:
                pair.deliver_stale()
            case 11 if arg % 4 == 0:
                pair.break_link(d_notices=arg % 8 == 0)
            case 12 if arg % 4 == 0:
                pair.notice()
        if arg % 16 == 0:
            pair.wait(0.2)
    pair.run()
    pair.rest_until_dialled()
    assert not pair.errors_p
    assert not pair.errors_d
    assert set(pair.committed) == set(pair.reports) == {plan.transfer for plan in plans}
    pair.notice()
    pair.check_at_rest()


# ---- where it goes on ----


def test_the_grant_says_what_arrived_and_only_the_rest_is_staged() -> None:
    pair, plan = in_flight()
    received = pair.receiver.counts.received_bytes
    pair.break_link()
    pair.deliver_up()  # Open, again
    grant = pair.down[-1]
    assert isinstance(grant, Grant)
    assert len(grant.arrived) == SPEC.places
    assert max(grant.arrived) > 0
    pair.run()
    assert pair.committed == {T: plan.ids}
    assert pair.receiver.counts.received_bytes == plan.total * SPEC.token_bytes > received
    assert (pair.sender.counts.resumed, pair.receiver.counts.resumed) == (1, 1)
    pair.check_at_rest()


def test_pieces_that_the_engine_imports_meanwhile_are_not_sent_again() -> None:
    pair, plan = in_flight()
    while step(pair, but="import_one"):
        pass
    held = len(pair.to_import)
    assert held
    before = pair.receiver.counts.received_bytes
    pair.break_link()
    pair.run()
    assert pair.committed == {T: plan.ids}
    assert pair.receiver.counts.received_bytes == plan.total * SPEC.token_bytes
    assert before < pair.receiver.counts.received_bytes
    pair.check_at_rest()


def test_what_lies_behind_a_hole_is_sent_again() -> None:
    pair, plan = Pair(), Plan(T, prompt_tokens=8)
    start(pair, plan)
    pair.deliver_up()
    pair.deliver_down()
    while pair.stage_one() or pair.write_one():
        pass
    data = [at for at, (message, _) in enumerate(pair.up) if isinstance(message, Data)]
    pair.deliver_up(data[-1])  # the second stripe was faster
    pair.finish_one()
    pair.break_link()
    pair.run()
    assert pair.committed == {T: plan.ids}
    pair.check_at_rest()


def test_a_lost_commit_is_said_again() -> None:
    pair, plan = Pair(), Plan(T)
    start(pair, plan)
    while not any(isinstance(message, Commit) for message, _ in pair.up):
        assert step(pair)
    while isinstance(pair.up[0][0], Data):
        pair.deliver_up()
    pair.break_link()
    pair.run()
    assert pair.committed == {T: plan.ids}
    pair.check_at_rest()


def test_a_lost_done_is_said_again() -> None:
    pair, plan = Pair(), Plan(T)
    start(pair, plan)
    while not pair.committed:
        assert step(pair)
    assert isinstance(pair.down[-1], Done)
    pair.break_link()
    pair.run()
    assert pair.reports[T].kv_bytes == plan.total * SPEC.token_bytes
    assert not pair.errors_p
    pair.check_at_rest()


def test_a_decode_node_may_commit_while_nobody_is_connected() -> None:
    pair, plan = Pair(), Plan(T, prompt_tokens=4)
    start(pair, plan)
    while step(pair, but="import_one"):
        pass
    assert pair.to_import
    pair.can_dial = False
    pair.break_link()
    pair.run()
    assert pair.committed == {T: plan.ids}
    assert not pair.reports
    pair.can_dial = True
    pair.connect()
    pair.run()
    assert pair.reports
    pair.check_at_rest()


def test_a_transfer_that_was_not_granted_yet_is_parked_again() -> None:
    pair, plan = Pair(), Plan(T)
    pair.open(plan)
    pair.deliver_up()
    assert pair.receiver.parked == 1
    pair.break_link()
    assert pair.receiver.parked == 0
    pair.deliver_up()
    pair.expect(plan)
    pair.allocate(plan)
    pair.commit(plan)
    pair.run()
    assert pair.committed == {T: plan.ids}
    pair.check_at_rest()


def test_a_newer_link_replaces_the_parked_open_of_an_older_one() -> None:
    pair, plan = Pair(), Plan(T)
    pair.open(plan)
    pair.deliver_up()
    pair.break_link(d_notices=False)
    pair.deliver_up()
    pair.notice()
    assert pair.receiver.parked == 1
    pair.expect(plan)
    pair.allocate(plan)
    pair.commit(plan)
    pair.run()
    assert pair.committed == {T: plan.ids}


# ---- who must not go on ----


def test_a_restarted_decode_node_ends_it_at_once() -> None:
    pair, _ = in_flight()
    pair.incarnation = "d2"
    pair.break_link()
    assert "was restarted" in pair.errors_p[T].message
    assert (pair.errors_p[T].code, pair.errors_p[T].retryable) == ("transfer_failed", True)


def test_a_decode_node_that_forgot_the_transfer_denies_it_at_once() -> None:
    pair, _ = in_flight()
    pair.receiver = Receiver(3, 4, SLOT_BYTES)  # the engine died, the agent did not
    pair.slots.clear()
    pair.to_import.clear()
    pair.break_link()
    pair.deliver_up()
    assert isinstance(pair.down[-1], Deny)
    assert pair.receiver.parked == 0
    pair.run()
    assert "not known" in pair.errors_p[T].message
    pair.check_at_rest()


def test_a_peer_that_broke_the_protocol_does_not_get_a_second_chance() -> None:
    pair, _ = in_flight()
    error = PeerError("nonsense", code="protocol_error")
    pair.p(ev.LinkDown(LINK, error))
    pair.d(ev.ConnLost(pair.conn, error))
    assert pair.errors_p[T] is pair.errors_d[T] is error


@pytest.mark.parametrize(
    "changes",
    [
        {"arrived": [40] * SPEC.places},
        {"arrived": [1]},
        {"have_tokens": 1},
        {"codec": "zip"},
    ],
)
def test_a_grant_that_makes_no_sense_ends_it(changes: dict) -> None:
    pair, _ = in_flight()
    pair.break_link()
    fields = {"credit_bytes": 64, "have_tokens": 0, "codec": "raw", "arrived": []} | changes
    pair.p(ev.FromPeer(LINK, Grant(T, 1, **fields)))
    assert pair.errors_p[T].code == "protocol_error"
    pair.check_at_rest()


def test_a_stranger_cannot_take_a_transfer_over() -> None:
    pair, plan = in_flight()
    opened = Open(T, 1, "m", "ident", SPEC.digest(), 40, plan.digest, ["raw"], True)
    pair.d(ev.FrameIn(99, "mallory", opened, 9))
    assert isinstance(pair.down.pop(), Deny)
    pair.run()
    assert pair.committed == {T: plan.ids}


def test_frames_of_an_older_link_are_dropped() -> None:
    pair, plan = in_flight()
    data = Data(T, 1, 0, 0, 0, 2, 36, 40, "raw", bytes(8))
    pair.break_link()
    pair.deliver_up()
    late = pair.receiver.counts.late_frames
    pair.d(ev.DataBegins(CONN, "p", data, data.piece.nbytes(SPEC), 1))
    pair.d(ev.FrameIn(CONN, "p", Commit(T, 1, [5], plan.digest), 1))
    again = Open(T, 1, "m", "ident", SPEC.digest(), 40, plan.digest, ["raw"], True)
    pair.d(ev.FrameIn(CONN, "p", again, 1))
    pair.d(ev.ConnLost(CONN, LOST))
    assert pair.receiver.counts.late_frames == late + 3
    pair.run()
    assert pair.committed == {T: plan.ids}
