"""Sender and receiver back to back: all goes well, and everything that can go wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_pair import (
    CONN,
    DEADLINE_S,
    EXPORT_SLOTS,
    IMPORT_SLOTS,
    LINK,
    SLOT_BYTES,
    SPEC,
    Pair,
    Plan,
    altered,
    piece_bytes,
)

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import Abort, Ack, Data, Deny, Done, Grant, Open
from pop_node.kv_stream.incoming import IMPORT_WAIT_S
from pop_node.kv_stream.parking import MAX_PARKED, PARK_S
from pop_node.kv_stream.spec import Piece
from wire.errors import DeadlineError, TransferError

T = bytes(range(16))


def start(pair: Pair, plan: Plan) -> None:
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    pair.commit(plan)


@pytest.mark.parametrize("order", range(6))
def test_open_expect_and_commit_meet_in_any_order(order: int) -> None:
    pair, plan = Pair(), Plan(T)
    steps = {
        0: "oeac",
        1: "eoac",
        2: "eaoc",
        3: "oeca",
        4: "ocea",
        5: "eaoc",
    }[order]
    for step in steps:
        {"o": pair.open, "e": pair.expect, "a": pair.allocate, "c": pair.commit}[step](plan)
        pair.run()
    assert pair.committed == {T: plan.ids}
    assert pair.reports[T].kv_bytes == pair.receiver.counts.received_bytes > 0
    pair.check_at_rest()


@pytest.mark.parametrize("have", [0, 1, 4, 8, 9])
@pytest.mark.parametrize("ids", [(1,), (1, 2, 3)])
def test_only_what_is_missing_is_sent(have: int, ids: tuple[int, ...]) -> None:
    pair, plan = Pair(), Plan(T, have_tokens=have, ids=ids)
    start(pair, plan)
    pair.run()
    assert pair.committed == {T: ids}
    missing = plan.total - have
    assert pair.receiver.counts.received_bytes == missing * SPEC.token_bytes
    pair.check_at_rest()


def test_nothing_is_sent_before_the_grant() -> None:
    pair, plan = Pair(), Plan(T)
    pair.open(plan)
    pair.expect(plan)
    pair.run()
    assert not pair.to_stage
    assert not pair.down
    pair.allocate(plan)
    assert [type(m) for m in pair.down] == [Grant]


def test_receipt_is_acknowledged_before_the_engine_imports() -> None:
    pair, plan = Pair(), Plan(T)
    start(pair, plan)
    pair.deliver_up()
    pair.deliver_down()
    pair.stage_one()
    pair.write_one()
    while pair.deliver_up() or pair.finish_one():
        pass
    ack = pair.down[-1]
    assert isinstance(ack, Ack)
    assert (ack.received_bytes, ack.credit_bytes_returned) == (piece_size(), 0)
    assert len(pair.to_import) == 1
    pair.import_one()
    assert pair.down[-1].credit_bytes_returned > 0


def piece_size() -> int:
    return Piece(0, 0, 0, 2, 0, 4).nbytes(SPEC)


def test_commit_that_overtakes_data_waits_for_it() -> None:
    pair, plan = Pair(), Plan(T, prompt_tokens=4)
    start(pair, plan)
    pair.deliver_up()
    pair.deliver_down()
    while pair.stage_one():
        pass
    assert not any(isinstance(m, Data) for m, _ in pair.up)
    for at, (message, _) in enumerate(pair.up):
        if not isinstance(message, Open):
            pair.deliver_up(at)
    assert pair.committed == {}
    pair.run()
    assert pair.committed == {T: plan.ids}


def test_open_is_parked_for_two_seconds_then_refused() -> None:
    pair, plan = Pair(), Plan(T)
    pair.open(plan)
    pair.deliver_up()
    assert pair.receiver.next_deadline() == PARK_S
    pair.wait(PARK_S - 0.01)
    assert not pair.down
    pair.wait(0.01)
    pair.run()
    assert pair.errors_p[T].code == "transfer_timeout"
    pair.check_at_rest()


def test_parking_is_bounded() -> None:
    pair = Pair()
    for n in range(MAX_PARKED + 1):
        opened = Open(n.to_bytes(16, "big"), 1, "m", "i", bytes(16), 1, bytes(16), ["raw"])
        pair.d(ev.FrameIn(CONN, "p", opened))
    assert pair.receiver.parked == MAX_PARKED
    assert [(m.code, m.retryable) for m in pair.down] == [("overloaded", True)]
    pair.d(ev.ConnLost(CONN, TransferError("gone")))
    assert pair.receiver.parked == 0


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"identity": "other"}, "identity_mismatch"),
        ({"model": "other"}, "identity_mismatch"),
        ({"spec": type(SPEC)(SPEC.groups[:1])}, "spec_mismatch"),
        ({"prompt_tokens": 8}, "prompt_mismatch"),
        ({"prompt_digest": bytes(16)}, "prompt_mismatch"),
    ],
)
def test_disagreement_is_a_typed_refusal_on_both_sides(changes: dict, code: str) -> None:
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    pair.open(plan, **changes)
    pair.run()
    assert (pair.errors_p[T].code, pair.errors_d[T].code) == (code, code)
    assert type(pair.errors_p[T]) is type(pair.errors_d[T])
    pair.check_at_rest()


def test_stranger_cannot_end_a_transfer() -> None:
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    opened = Open(T, 1, "m", "x", bytes(16), 1, bytes(16), ["raw"])
    pair.d(ev.FrameIn(9, "mallory", opened))
    assert isinstance(pair.down.pop(), Deny)
    pair.d(ev.FrameIn(9, "mallory", Abort(T, 1, "x", "y")))
    pair.open(plan)
    pair.allocate(plan)
    pair.commit(plan)
    pair.run()
    assert pair.committed == {T: plan.ids}


def test_frames_of_older_attempts_are_dropped_and_counted() -> None:
    pair, plan = Pair(), Plan(T, attempt=2)
    start(pair, plan)
    for message in (
        Open(T, 1, "m", "ident", bytes(16), 9, bytes(16), ["raw"]),
        Abort(T, 1, "x", "y"),
    ):
        pair.d(ev.FrameIn(CONN, "p", message))
    old = Data(T, 1, 0, 0, 0, 2, 0, 4, "raw", bytes(8))
    pair.d(ev.DataBegins(CONN, "p", old, piece_size()))
    for message in (Done(T, 1), Grant(T, 1, 99, 0, "raw"), Deny(T, 1, "x", "y", True)):
        pair.p(ev.FromPeer(LINK, message))
    assert (pair.receiver.counts.late_frames, pair.sender.counts.late_frames) == (3, 3)
    pair.run()
    assert pair.committed == {T: plan.ids}


def test_newer_attempt_takes_over() -> None:
    pair = Pair()
    pair.expect(Plan(T))
    pair.expect(Plan(T, attempt=2))
    assert pair.errors_d[T].code == "transfer_failed"
    with pytest.raises(ValueError, match="in use"):
        pair.receiver.handle(ev.Expected(T, 2, "p", "m", "i", SPEC, 1, bytes(16), 1.0), 0.0)


def test_open_after_the_end_is_refused_at_once() -> None:
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    pair.d(ev.Cancelled(T, "cancelled", "the client left"))
    pair.open(plan)
    pair.run()
    assert pair.receiver.parked == 0
    assert pair.errors_p[T].code == "transfer_failed"
    assert pair.errors_d[T].code == "cancelled"


def test_slot_stays_taken_until_late_bytes_are_in() -> None:
    pair, plan = Pair(), Plan(T)
    start(pair, plan)
    for move in (pair.deliver_up, pair.deliver_down, pair.stage_one, pair.write_one):
        move()
    while pair.deliver_up():
        pass
    (slot, _, _) = pair.arriving[0]
    pair.d(ev.Cancelled(T, "cancelled", ""))
    assert pair.receiver.pool.used == 1
    assert pair.receiver.pool.promised == 0
    pair.finish_one()
    assert pair.receiver.pool.free == IMPORT_SLOTS
    assert not pair.to_import
    assert slot >= EXPORT_SLOTS
    pair.check_at_rest()


def test_damaged_piece_ends_both_sides() -> None:
    pair, plan = Pair(), Plan(T)
    start(pair, plan)
    pair.deliver_up()
    pair.deliver_down()
    pair.stage_one()
    pair.write_one()
    pair.up = [altered(frame, 3) if frame[1] else frame for frame in pair.up]
    pair.run()
    assert pair.errors_d[T].code == pair.errors_p[T].code == "checksum_mismatch"
    assert pair.receiver.counts.bad_checksums == 1
    pair.check_at_rest()


def test_data_beyond_the_credit_is_a_violation() -> None:
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    pair.deliver_up()
    credit = pair.down[0].credit_bytes // SLOT_BYTES
    for n in range(credit + 1):
        data = Data(T, 1, 0, 0, 0, 1, n, n + 1, "raw", bytes(8))
        pair.d(ev.DataBegins(CONN, "p", data, 8, pair.link))
    assert pair.errors_d[T].code == "protocol_error"
    assert pair.receiver.pool.used == credit


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (Ack(T, 1, 0, 10**9), "protocol_error"),
        (Done(T, 1), "protocol_error"),
        (Grant(T, 1, 64, 0, "raw"), "protocol_error"),
        (Abort(T, 1, "engine_died", "x"), "engine_died"),
        (Abort(T, 1, "invalid_request", "x"), "invalid_request"),
    ],
)
def test_decode_node_out_of_line_ends_the_transfer(message: object, code: str) -> None:
    pair, plan = Pair(), Plan(T)
    start(pair, plan)
    pair.deliver_up()
    pair.deliver_down()
    pair.p(ev.FromPeer(LINK, message))
    assert pair.errors_p[T].code == code
    pair.check_at_rest()


@pytest.mark.parametrize(
    "staged",
    [
        (Piece(5, 0, 0, 1, 0, 1), 8),
        (Piece(0, 0, 0, 1, 0, 1), 9),
        (Piece(0, 0, 0, 2, 0, 9), 144),
        (Piece(0, 0, 0, 1, 0, 1), 8),
    ],
)
def test_bad_staging_fails_and_gives_the_slot_back(staged: tuple[Piece, int]) -> None:
    pair, plan = Pair(), Plan(T, have_tokens=1)
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    pair.deliver_up()
    pair.deliver_down()
    pair.to_stage.clear()
    pair.export[0] = b"x"
    pair.p(ev.Staged(T, 0, *staged))
    assert "cannot send a piece" in pair.errors_p[T].message
    pair.check_at_rest()


def test_pieces_without_credit_wait_in_order() -> None:
    pair, plan = Pair(), Plan(T, prompt_tokens=40)
    start(pair, plan)
    pair.deliver_up()
    pair.deliver_down()
    while pair.stage_one() or pair.write_one():
        pass
    sent = [m.piece for m, _ in pair.up if isinstance(m, Data)]
    assert len(sent) * SLOT_BYTES <= IMPORT_SLOTS * SLOT_BYTES
    assert sent == sorted(sent, key=lambda p: p.token_lo)
    pair.run()
    assert pair.committed == {T: plan.ids}


def test_many_transfers_share_the_slots_and_all_end() -> None:
    pair = Pair()
    plans = [Plan(bytes([n]) * 16, prompt_tokens=5 + n) for n in range(12)]
    for plan in plans:
        start(pair, plan)
    pair.run()
    assert set(pair.committed) == {plan.transfer for plan in plans}
    pair.check_at_rest()


# ---- waits ----


def test_silence_after_data_ends_the_sender() -> None:
    pair, plan = Pair(), Plan(T)
    start(pair, plan)
    pair.p(ev.LinkRtt(LINK, 0.4))
    pair.deliver_up()
    pair.deliver_down()
    pair.stage_one()
    pair.write_one()
    assert pair.sender.next_deadline() == pytest.approx(8.0)  # 20 RTT
    pair.wait(7.9)
    assert not pair.ended_p
    pair.wait(0.2)
    assert pair.errors_p[T].code == "transfer_timeout"


def test_open_that_never_comes_ends_the_receiver() -> None:
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    pair.wait(4.9)
    assert not pair.ended_d
    pair.wait(0.2)
    assert pair.errors_d[T].code == "transfer_timeout"


def test_link_that_never_comes_ends_the_sender() -> None:
    pair, plan = Pair(link_is_up=True), Plan(T)
    pair.open(plan)
    pair.wait(5.0)
    assert pair.errors_p[T].code == "transfer_timeout"
    assert not pair.up


def test_engine_that_never_imports_ends_both() -> None:
    pair, plan = Pair(), Plan(T)
    start(pair, plan)
    while (
        pair.stage_one()
        or pair.write_one()
        or pair.deliver_up()
        or pair.finish_one()
        or pair.deliver_down()
    ):
        pass
    assert pair.to_import
    pair.wait(IMPORT_WAIT_S)
    pair.run()
    assert pair.errors_d[T].code == "transfer_timeout"
    assert pair.errors_p[T].code == "transfer_timeout"
    pair.check_at_rest()


def test_missing_pieces_after_the_commit_end_both() -> None:
    pair, plan = Pair(), Plan(T)
    start(pair, plan)
    pair.deliver_up()
    pair.deliver_down()
    while pair.stage_one() or pair.write_one() or pair.deliver_down():
        while pair.up and isinstance(pair.up[0][0], Data) and pair.sender.counts.sent_bytes > 64:
            pair.up.pop(0)  # lost with a stripe that the sender believes in
        while pair.deliver_up() or pair.finish_one() or pair.import_one():
            pass
    assert not pair.committed
    pair.wait(5.1)
    pair.run()
    assert pair.ended_p[T] == 1
    pair.check_at_rest()
    assert pair.ended_d[T] == 1


def test_deadline_ends_both_with_its_own_error() -> None:
    pair, plan = Pair(), Plan(T, deadline=3.0)
    pair.expect(plan)
    pair.open(plan)
    pair.run()
    pair.wait(3.0)
    assert isinstance(pair.errors_p[T], DeadlineError)
    assert isinstance(pair.errors_d[T], DeadlineError)
    pair.check_at_rest()


def test_long_compute_is_no_lack_of_progress() -> None:
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    pair.run()
    pair.wait(DEADLINE_S - 1)
    assert not pair.ended_p
    assert not pair.ended_d
    pair.commit(plan)
    pair.run()
    assert pair.committed == {T: plan.ids}


# ---- anything at any time ----

MOVES = st.tuples(st.integers(0, 19), st.integers(0, 2**16))


def run_move(pair: Pair, plans: list[Plan], move: int, arg: int, *, faults: bool) -> None:
    plan = plans[arg % len(plans)]
    match move:
        case 0 | 1:
            pair.stage_one()
        case 2 | 3:
            pair.write_one()
        case 4 | 5:
            pair.deliver_up(0 if not faults else arg if arg % 4 == 0 else 0)
        case 6 | 7:
            pair.finish_one(arg)
        case 8 | 9:
            pair.import_one(arg)
        case 10 | 11:
            pair.deliver_down()
        case 12 if plan.transfer not in pair.plans:
            pair.expect(plan)
            pair.open(plan)
        case 13 if plan.transfer in pair.plans and plan.transfer not in pair.memory:
            pair.allocate(plan)
        case 14 if plan.transfer in pair.plans:
            pair.commit(plan)
        case 15 if faults and pair.up:
            pair.up.pop(arg % len(pair.up))
        case 16 if faults and pair.up:
            pair.up.insert(arg % 7, pair.up[arg % len(pair.up)])
        case 17 if faults and pair.up:
            pair.up[arg % len(pair.up)] = altered(pair.up[arg % len(pair.up)], arg)
        case 18 if faults and pair.down:
            if arg % 2:
                pair.down.pop(arg % len(pair.down))
            else:
                pair.down.append(pair.down[arg % len(pair.down)])
        case 19 if faults:
            match arg % 6:
                case 0:
                    pair.p(ev.Cancelled(plan.transfer, "cancelled", ""))
                case 1:
                    pair.d(ev.Cancelled(plan.transfer, "cancelled", ""))
                case 2:
                    pair.break_link(d_notices=arg % 4 < 2)
                case 3:
                    pair.wait(arg % 40 / 10)
                case 4:
                    pair.p(ev.EngineLost("m"))
                case 5:
                    pair.d(ev.EngineLost("m"))
                    for item in pair.to_import:
                        del pair.slots[item.slot]
                    pair.to_import.clear()


@settings(max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=120), st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_any_order_delivers_every_byte(moves: list[tuple[int, int]], sizes: list[int]) -> None:
    pair = Pair()
    plans = [Plan(bytes([n]) * 16, size, size * n // 5) for n, size in enumerate(sizes)]
    for move, arg in moves:
        run_move(pair, plans, move, arg, faults=False)
    for plan in plans:
        if plan.transfer not in pair.plans:
            pair.expect(plan)
            pair.open(plan)
        if plan.transfer not in pair.memory:
            pair.allocate(plan)
        pair.commit(plan)
    pair.run()
    assert set(pair.committed) == set(pair.reports) == {plan.transfer for plan in plans}
    assert not pair.errors_p
    assert not pair.errors_d
    pair.check_at_rest()


@settings(max_examples=300, deadline=None)
@given(st.lists(MOVES, max_size=150), st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_faults_leak_nothing_and_end_once(moves: list[tuple[int, int]], sizes: list[int]) -> None:
    pair = Pair()
    plans = [Plan(bytes([n]) * 16, size) for n, size in enumerate(sizes)]
    for move, arg in moves:
        run_move(pair, plans, move, arg, faults=True)
    pair.check_at_rest()  # bytes were compared at each commit
    assert set(pair.ended_p) == set(pair.ended_d) == set(pair.plans)
    assert set(pair.reports) <= set(pair.committed)


@pytest.mark.parametrize("kind", ["lost", "link of version 1", "cancel_p", "cancel_d"])
def test_fault_sweep(kind: str) -> None:
    """Fail the Nth effect for N = 1, 2, ... until a run meets no fault."""
    for n in range(1000):
        pair = Pair(version=1)
        plans = [Plan(bytes([k]) * 16, 6 + k) for k in range(2)]

        def strike(pair: Pair = pair) -> None:
            match kind:
                case "link of version 1":
                    pair.break_link()
                case "cancel_p":
                    pair.p(ev.Cancelled(bytes(16), "cancelled", ""))
                case "cancel_d":
                    pair.d(ev.Cancelled(bytes(16), "cancelled", ""))

        pair.is_lost = kind == "lost"
        pair.strike = strike
        pair.effects_left = n
        for plan in plans:
            start(pair, plan)
        pair.run()
        met = pair.effects_left < 0
        pair.check_at_rest()
        assert set(pair.ended_p) == set(pair.ended_d) == set(pair.plans)
        if not met:
            assert n > 50
            assert not pair.errors_p
            return
    raise AssertionError("the sweep did not end")


def test_piece_bytes_are_what_the_memory_holds() -> None:
    piece = Piece(0, 1, 0, 2, 3, 5)
    assert len(piece_bytes(b"kv", piece)) == piece.nbytes(SPEC)
