"""A transfer whose connection breaks goes on where it was, or ends in time."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_pair import CONN, EXPORT_SLOTS, IMPORT_SLOTS, LINK, SLOT_BYTES, SPEC, Pair, Plan

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import Ack, Commit, Data, Deny, Done, Grant, Open
from pop_node.kv_stream.liveness import DIAL_RTTS, MIN_DIAL_S, MIN_WAIT_S, WAIT_RTTS
from pop_node.kv_stream.outgoing import REDIAL_MAX_S
from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec, Piece
from wire.errors import PeerError

T = bytes(range(16))
LOST = PeerError("gone", code="link_lost")


def start(pair: Pair, *plans: Plan) -> None:
    for plan in plans:
        pair.expect(plan)
        pair.open(plan)
        pair.allocate(plan)
        pair.commit(plan)


def step(pair: Pair, *, but: str = "") -> bool:
    """One event, in the order of ``Pair.run``; ``but`` names one that must wait."""
    moves = [
        pair.stage_one,
        pair.hear_staged,
        pair.write_one,
        pair.deliver_up,
        pair.finish_one,
        pair.import_one,
        pair.deliver_down,
    ]
    return any(move() for move in moves if move.__name__ != but)


def in_flight(tokens: int = 40, **changes) -> tuple[Pair, Plan]:
    """A transfer in whose middle some pieces have been imported and others are on their way."""
    pair, plan = Pair(), Plan(T, prompt_tokens=tokens, **changes)
    start(pair, plan)
    for _ in range(30):
        step(pair)
    assert 0 < pair.receiver.counts.received_bytes < (tokens - 1) * SPEC.token_bytes
    return pair, plan


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


# ---- a dial that others began ----

REFUSED = PeerError("cannot reach d: refused")
FRESH = bytes(range(16, 32))


def dialling() -> Pair:
    """A decode node died; its transfer waits for a dial that began while nobody listened."""
    pair, _ = in_flight()
    while pair.to_import:
        pair.import_one()
    pair.can_dial = False
    pair.break_link()
    assert pair.dials[-1] == pair.now
    return pair


def test_a_fresh_transfer_does_not_share_the_fate_of_a_dial_begun_before_it() -> None:
    pair = dialling()
    pair.receiver, pair.incarnation = Receiver(EXPORT_SLOTS, IMPORT_SLOTS, SLOT_BYTES), "d2"
    pair.slots.clear()
    pair.wait(0.5)
    plan = Plan(FRESH)
    start(pair, plan)
    pair.can_dial = True
    pair.p(ev.LinkDown(LINK, REFUSED))  # the old dial ends, a new one is made at once
    assert pair.link_is_up
    pair.run()
    assert "was restarted" in pair.errors_p[T].message
    assert pair.committed == {FRESH: plan.ids}
    assert FRESH in pair.reports
    pair.check_at_rest()


def test_a_fresh_transfer_fails_with_the_first_dial_of_its_own() -> None:
    """Its router has other decode nodes: waiting for this one is not worth it."""
    pair = dialling()
    pair.open(Plan(FRESH))
    pair.p(ev.LinkDown(LINK, REFUSED))
    assert FRESH not in pair.errors_p
    pair.p(ev.LinkDown(LINK, REFUSED))
    assert pair.errors_p[FRESH] is REFUSED
    assert T not in pair.errors_p
    pair.check_at_rest()


def test_a_fresh_transfer_does_not_wait_for_the_end_of_a_pause() -> None:
    """The dials before it pause for longer and longer; its own is made when it comes."""
    pair = dialling()
    for _ in range(3):
        pair.p(ev.LinkDown(LINK, REFUSED))
        pair.wait(1.0)
    pair.p(ev.LinkDown(LINK, REFUSED))
    before = len(pair.dials)
    pair.open(Plan(FRESH))
    assert pair.dials[before:] == [pair.now]
    pair.p(ev.LinkDown(LINK, REFUSED))
    assert pair.errors_p[FRESH] is REFUSED


def test_a_dial_that_hangs_costs_a_fresh_transfer_no_more_than_its_wait() -> None:
    pair = dialling()
    pair.wait(1.0)
    pair.open(Plan(FRESH))
    pair.wait(MIN_WAIT_S - 0.01)
    assert FRESH not in pair.errors_p
    pair.wait(0.02)
    assert pair.errors_p[FRESH].code == "transfer_timeout"


def test_a_peer_that_turned_out_to_be_another_is_nobodys_peer() -> None:
    pair = dialling()
    pair.open(Plan(FRESH))
    wrong = PeerError("dialled d and reached e", code="identity_mismatch")
    pair.p(ev.LinkDown(LINK, wrong))
    assert pair.errors_p[FRESH] is pair.errors_p[T] is wrong


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


# ---- waits ----


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


# ---- what stays of a broken one ----

TOKENS_ONLY = KvSpec(
    (
        KvGroup("tokens", (0, 1), (KvComponent("k", "float32", (2,)),)),
        KvGroup("tokens", (2,), (KvComponent("c", "float32", (2,)),)),
    )
)


def kept_of(receiver: Receiver, effects: list) -> int:
    (failed,) = [effect for effect in effects if isinstance(effect, ev.Failed)]
    return failed.kept_tokens


@pytest.mark.parametrize("spec", [TOKENS_ONLY, SPEC])
def test_kept_tokens_are_complete_everywhere_and_given_to_the_engine(spec: KvSpec) -> None:
    receiver = Receiver(0, 16, 1024)
    expected = ev.Expected(T, 1, "p", "m", "i", spec, 32, bytes(16), 60.0)
    receiver.handle(expected, 0.0)
    receiver.handle(ev.Allocated(T, 4), 0.0)
    opened = Open(T, 1, "m", "i", spec.digest(), 32, bytes(16), ["raw"])
    receiver.handle(ev.FrameIn(1, "p", opened, 1), 0.0)
    assert receiver.kept_tokens(T) == 4 * (spec is TOKENS_ONLY)

    def receive(piece: Piece, *, end: bool = True) -> None:
        fields = (piece.group, piece.component, piece.layer_lo, piece.layer_hi)
        data = Data(T, 1, *fields, piece.token_lo, piece.token_hi, "raw", bytes(8))
        begin = ev.DataBegins(1, "p", data, piece.nbytes(spec), 1)
        (into,) = receiver.handle(begin, 0.0)
        if end:
            imports = receiver.handle(ev.DataEnded(into.slot, bytes(8)), 0.0)
            assert isinstance(imports[0], ev.Import)

    if spec is TOKENS_ONLY:
        receive(Piece(0, 0, 0, 2, 4, 20))
        assert receiver.kept_tokens(T) == 4
        receive(Piece(1, 0, 0, 1, 4, 12))
        receive(Piece(1, 0, 0, 1, 16, 20))  # behind a hole
        receive(Piece(1, 0, 0, 1, 12, 16), end=False)  # still on its way
    want = 12 * (spec is TOKENS_ONLY)
    assert receiver.kept_tokens(T) == want
    effects = receiver.handle(ev.Cancelled(T, "cancelled", ""), 0.0)
    assert kept_of(receiver, effects) == want
    assert receiver.kept_tokens(T) == 0
