"""How long sender and receiver wait for each other, and what counts as progress."""

from __future__ import annotations

import pytest

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import Data
from pop_node.kv_stream.incoming import IMPORT_WAIT_S
from tests.pop_node.kv_stream.kv_content import DEADLINE_S, Plan
from tests.pop_node.kv_stream.kv_ends import LINK
from tests.pop_node.kv_stream.kv_moves import T, start
from tests.pop_node.kv_stream.kv_pair import Pair
from wire.errors import DeadlineError


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
