"""Transfers that wait for a dial, and dials that others began."""

from __future__ import annotations

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.liveness import MIN_WAIT_S
from pop_node.kv_stream.receiver import Receiver
from tests.pop_node.kv_stream.kv_content import Plan
from tests.pop_node.kv_stream.kv_ends import EXPORT_SLOTS, IMPORT_SLOTS, LINK, SLOT_BYTES
from tests.pop_node.kv_stream.kv_moves import T, in_flight, start
from tests.pop_node.kv_stream.kv_pair import Pair
from wire.errors import PeerError

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
