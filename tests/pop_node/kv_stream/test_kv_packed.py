"""Sender and receiver back to back, with pieces that are packed: who agrees to it, and what becomes
of blocks that are unpacked while their transfer or its connection ends."""

from __future__ import annotations

import msgspec
import pytest

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import (
    CODEC_PACKED,
    CODEC_RAW,
    Ack,
    Data,
    Grant,
    Open,
    data_checksum,
)
from pop_node.kv_stream.spec import Piece
from tests.pop_node.kv_stream.kv_content import SPEC, Plan, piece_bytes
from tests.pop_node.kv_stream.kv_ends import CONN, IMPORT_SLOTS, LINK
from tests.pop_node.kv_stream.kv_moves import T, in_flight, start, step
from tests.pop_node.kv_stream.kv_pair import Pair
from wire.errors import PeerError

HALF = Piece(0, 1, 0, 2, 0, 4)  # bfloat16


def frame(plan: Plan, piece: Piece, payload: bytes, codec: str = CODEC_PACKED) -> Data:
    checksum = data_checksum(plan.transfer, plan.attempt, piece, codec, payload)
    return Data(plan.transfer, plan.attempt, *piece.numbers, codec, checksum)


def granted(**changes) -> tuple[Pair, Plan]:
    """A transfer whose ``Grant`` has come, and of which nothing was sent."""
    pair, plan = Pair(), Plan(T, packs=True, **changes)
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    pair.deliver_up()
    return pair, plan


def again(plan: Plan) -> Open:
    """What takes up a transfer that was granted before."""
    pair = Pair()
    pair.open(plan)
    opened = pair.up[0][0]
    assert isinstance(opened, Open)
    return msgspec.structs.replace(opened, resumed=True)


def unpacking() -> tuple[Pair, Plan]:
    """The first block is in and being unpacked."""
    pair, plan = Pair(), Plan(T, prompt_tokens=40, packs=True)
    start(pair, plan)
    while not pair.to_unpack:
        assert step(pair)
    return pair, plan


def test_packed_and_raw_pieces_arrive_bit_equal_and_are_counted() -> None:
    pair, plan = Pair(), Plan(T, prompt_tokens=40, packs=True)
    start(pair, plan)
    pair.run()
    assert pair.committed == {T: plan.ids}
    sent, got = pair.sender.counts, pair.receiver.counts
    assert sent.packed_pieces == got.unpacked_pieces > 0
    assert sent.raw_pieces > sent.packed_pieces / 2  # float32, and every second chunk
    assert sent.sent_bytes == got.received_bytes == plan.prompt_tokens * SPEC.token_bytes
    assert got.received_wire_bytes < got.received_bytes
    report = pair.reports[T]
    assert report.kv_bytes == got.received_bytes
    frames = sent.packed_pieces + sent.raw_pieces
    assert report.wire_bytes == sent.sent_wire_bytes == got.received_wire_bytes + 60 * frames
    pair.check_at_rest()


@pytest.mark.parametrize("offered", [True, False])
def test_one_side_that_knows_no_packing_makes_it_raw(offered: bool) -> None:
    raw = (CODEC_RAW,)
    pair, plan = Pair(), Plan(T, packs=True)
    pair.expect(plan, codecs=plan.codecs if not offered else raw)
    pair.open(plan, codecs=plan.codecs if offered else raw)
    pair.allocate(plan)
    pair.commit(plan)
    pair.deliver_up()
    assert [m.codec for m in pair.down if isinstance(m, Grant)] == [CODEC_RAW]
    pair.run()
    assert pair.committed == {T: plan.ids}
    assert pair.sender.counts.packed_pieces == 0
    pair.check_at_rest()


def test_open_offers_what_it_was_told_and_takes_no_other_grant() -> None:
    pair = Pair()
    pair.open(Plan(T, packs=True))
    (opened, _) = pair.up[0]
    assert isinstance(opened, Open)
    assert opened.codecs == [CODEC_PACKED, CODEC_RAW]
    raw = Plan(bytes(16))
    pair.open(raw)
    pair.p(ev.FromPeer(LINK, Grant(raw.transfer, 1, 64, 0, CODEC_PACKED)))
    assert pair.errors_p[raw.transfer].code == "protocol_error"


def test_credit_and_acknowledgements_count_what_a_block_decodes_to() -> None:
    pair, plan = granted()
    block = pair.pack(piece_bytes(b"kv", HALF))
    pair.d(ev.DataBegins(CONN, "p", frame(plan, HALF, block), len(block), pair.link))
    (slot,) = pair.slots
    whole = HALF.nbytes(SPEC)
    pair.d(ev.DataMoved(slot, len(block) // 2))
    pair.arriving.append((slot, frame(plan, HALF, block), block))
    pair.arriving_on[slot] = CONN
    pair.finish_one()
    pair.unpack_one()
    acks = [m.received_bytes for m in pair.down if isinstance(m, Ack)]
    assert acks == [whole // 2, whole]


@pytest.mark.parametrize(
    "forge",
    [
        lambda block: b"\xff" * len(block),  # no block at all
        lambda block: (1).to_bytes(len(block), "big"),  # of a shorter piece
    ],
)
def test_forged_block_ends_both_sides_like_a_damaged_piece(forge) -> None:
    pair, plan = granted()
    block = pair.pack(piece_bytes(b"kv", HALF))
    pair.unpacked[(1).to_bytes(len(block), "big")] = b"short"
    pair.deliver_down()
    pair.to_stage.clear()
    forged = forge(block)
    pair.up.append((frame(plan, HALF, forged), forged))
    pair.run()
    assert pair.errors_d[T].code == pair.errors_p[T].code == "checksum_mismatch"
    assert pair.receiver.counts.bad_checksums == 1
    assert not pair.to_import
    pair.check_at_rest()


@pytest.mark.parametrize("extra", [0, 1])
def test_packed_piece_that_is_no_shorter_is_a_violation(extra: int) -> None:
    pair, plan = granted()
    payload = bytes(HALF.nbytes(SPEC) + extra)
    pair.d(ev.DataBegins(CONN, "p", frame(plan, HALF, payload), len(payload), pair.link))
    assert pair.errors_d[T].code == "protocol_error"
    assert not pair.slots


def test_packed_piece_that_was_not_granted_is_a_violation() -> None:
    pair, plan = Pair(), Plan(T)
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    pair.deliver_up()
    pair.d(ev.DataBegins(CONN, "p", frame(plan, HALF, b"x"), 1, pair.link))
    assert pair.errors_d[T].code == "protocol_error"


@pytest.mark.parametrize("end", ["cancelled", "engine", "connection", "newer attempt"])
def test_slot_stays_taken_while_it_is_unpacked(end: str) -> None:
    pair, plan = unpacking()
    (item,) = pair.to_unpack
    used = pair.receiver.pool.used
    match end:
        case "cancelled":
            pair.d(ev.Cancelled(T, "cancelled", ""))
        case "engine":
            pair.d(ev.EngineLost("m"))
        case "connection":
            pair.break_link()
        case "newer attempt":
            pair.expect(Plan(T, attempt=2, prompt_tokens=40, packs=True))
    assert item.slot in pair.slots
    assert pair.receiver.pool.used >= 1
    assert pair.receiver.pool.used <= used
    imports = len(pair.to_import)
    pair.unpack_one()
    resumes = end == "connection"  # its bytes are in: the piece counts
    assert len(pair.to_import) == imports + resumes
    assert (pair.receiver.counts.late_frames > 0) != resumes
    if resumes:
        pair.rest_until_dialled()
        assert pair.committed == {T: plan.ids}
    pair.to_import = [item for item in pair.to_import if end != "engine"]
    pair.slots = {slot: held for slot, held in pair.slots.items() if end != "engine"}
    pair.run()
    assert pair.receiver.pool.free == IMPORT_SLOTS


def test_block_that_is_unpacked_after_the_peer_came_again_is_not_counted_twice() -> None:
    pair, plan = unpacking()
    pair.break_link()
    while not any(isinstance(m, Grant) for m in pair.down):
        assert pair.deliver_up()
    (grant,) = [m for m in pair.down if isinstance(m, Grant)]
    assert grant.codec == CODEC_PACKED
    pair.unpack_one()  # of the old link: the peer was told that it is missing
    assert pair.receiver.counts.late_frames == 1
    pair.run()
    assert pair.committed == {T: plan.ids}
    pair.check_at_rest()


def test_peer_that_comes_again_over_the_link_that_broke_is_not_heard() -> None:
    """It would forget the piece that is being unpacked for this link. No honest peer does it."""
    pair, plan = unpacking()
    link, conn = pair.link, pair.conn
    pair.lose(conn, PeerError("gone", code="link_lost"))
    late = pair.receiver.counts.late_frames
    pair.d(ev.FrameIn(conn + 1, "p", again(plan), link))
    assert pair.receiver.counts.late_frames == late + 1
    imports = len(pair.to_import)
    pair.unpack_one()
    assert len(pair.to_import) == imports + 1
    pair.break_link(d_notices=False)
    pair.rest_until_dialled()
    assert pair.committed == {T: plan.ids}


@pytest.mark.parametrize("d_notices", [True, False])
@pytest.mark.parametrize("moves", [3, 9, 27])
def test_resume_sends_what_is_missing_packed_again(d_notices: bool, moves: int) -> None:
    pair, plan = in_flight(packs=True)
    for _ in range(3):
        for _ in range(moves):
            step(pair)
        pair.break_link(d_notices=d_notices)
        pair.rest_until_dialled()
    pair.notice()
    pair.run()
    pair.rest_until_dialled()
    assert pair.committed == {T: plan.ids}
    assert pair.sender.counts.packed_pieces >= pair.receiver.counts.unpacked_pieces > 0
    pair.check_at_rest()
