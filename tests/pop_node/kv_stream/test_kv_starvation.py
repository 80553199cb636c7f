"""Blocks that wait for KV are given back when nothing else can run, and only then."""

from __future__ import annotations

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.liveness import MIN_WAIT_S
from tests.pop_node.kv_stream.kv_content import Plan
from tests.pop_node.kv_stream.kv_pair import Pair

OLD, YOUNG = bytes(range(16)), bytes(range(1, 17))


def granted(*transfers: bytes) -> tuple[Pair, list[Plan]]:
    """Transfers whose prefill legs queue: blocks are held, grants are out, nothing was computed."""
    pair, plans = Pair(), [Plan(t, deadline=10_000.0) for t in transfers]
    for plan in plans:
        pair.expect(plan)
        pair.open(plan)
        pair.allocate(plan)
    while any(move() for move in (pair.write_one, pair.deliver_up, pair.deliver_down)):
        pass
    return pair, plans


def test_a_prefill_leg_may_queue_while_the_decode_node_has_work():
    pair, _ = granted(OLD)
    pair.wait(20 * MIN_WAIT_S)
    pair.d(ev.Starving(True))
    pair.wait(0.9 * MIN_WAIT_S)
    pair.d(ev.Starving(False))
    pair.wait(20 * MIN_WAIT_S)
    assert not pair.errors_d


def test_an_engine_that_stands_still_gets_the_youngest_blocks_back_one_transfer_at_a_time():
    pair, _ = granted(OLD, YOUNG)
    pair.d(ev.Starving(True))
    pair.wait(0.99 * MIN_WAIT_S)
    assert not pair.errors_d
    pair.wait(0.02 * MIN_WAIT_S)
    assert pair.errors_d.keys() == {YOUNG}
    assert (pair.errors_d[YOUNG].code, pair.errors_d[YOUNG].retryable) == ("transfer_timeout", True)
    pair.wait(0.9 * MIN_WAIT_S)
    assert OLD not in pair.errors_d, "what the younger one held may do"
    pair.wait(0.2 * MIN_WAIT_S)
    assert OLD in pair.errors_d
    pair.run()
    assert pair.errors_p.keys() == {OLD, YOUNG}, "the prefill node is told"
    pair.check_at_rest()


def test_a_transfer_that_brings_something_keeps_its_blocks():
    pair, (old, young) = granted(OLD, YOUNG)
    assert pair.stage_one()
    while any(move() for move in (pair.hear_staged, pair.write_one, pair.deliver_up)):
        pass
    assert pair.finish_one()
    assert pair.import_one()
    while pair.deliver_down():
        pass
    pair.d(ev.Starving(True))
    pair.wait(1.5 * MIN_WAIT_S)
    assert len(pair.errors_d) == 1
    pair.wait(20 * MIN_WAIT_S)
    assert len(pair.errors_d) == 1, "the one that moves is left alone"
    moving = old if YOUNG in pair.errors_d else young
    pair.commit(moving)
    pair.run()
    assert moving.transfer in pair.reports
