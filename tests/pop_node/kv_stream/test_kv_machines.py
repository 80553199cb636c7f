"""Sender and receiver back to back: the hand-over, and what either refuses of the other."""

from __future__ import annotations

import pytest

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import Abort, Ack, Data, Deny, Done, Grant, Open
from pop_node.kv_stream.parking import MAX_PARKED, PARK_S
from pop_node.kv_stream.spec import Piece
from tests.pop_node.kv_stream.kv_content import SPEC, Plan, altered, piece_bytes
from tests.pop_node.kv_stream.kv_ends import CONN, EXPORT_SLOTS, IMPORT_SLOTS, LINK, SLOT_BYTES
from tests.pop_node.kv_stream.kv_moves import T, start
from tests.pop_node.kv_stream.kv_pair import Pair
from wire.errors import TransferError


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


def test_piece_bytes_are_what_the_memory_holds() -> None:
    piece = Piece(0, 1, 0, 2, 3, 5)
    assert len(piece_bytes(b"kv", piece)) == piece.nbytes(SPEC)
