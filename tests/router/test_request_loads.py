"""The request machine and nodes that have to load the model first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.request.attempt import HOLD_LOADS, HOLD_MORE_S
from router.request.events import (
    ClientGone,
    CloseStream,
    EmitError,
    LinkLost,
    NodeSaid,
    Replan,
    Routed,
    SendCancel,
    SendSubmit,
    SendWarm,
    Tick,
    Tokens,
)
from router.request.record import LoadWaited
from router.routing.avoidance import NodeStart
from router.routing.costs import Reason
from router.routing.policy import Route
from tests.router.test_request_machine import entry, machine, routed, text_of, wanted
from wire.messages import Accepted, Detached, Finished, Loading, Refused, Warm


def cold(
    prefill: str = "p", decode: str = "d", prefill_s: float = 0.0, decode_s: float = 0.0
) -> Routed:
    route = Route(
        prefill, decode, "x", "y", 9.0, (), prefill_load_s=prefill_s, decode_load_s=decode_s
    )
    return Routed(route, 1, bytes(16), "127.0.0.1:9")


def submits(effects: list[object]) -> list[tuple[str, str]]:
    return [(e.node, e.message.leg) for e in effects if isinstance(e, SendSubmit)]


def test_a_leg_waits_for_its_model_as_long_as_the_request_may() -> None:
    m = machine()
    m.handle(cold("n", "n", 2.0, 2.0), 0.0)
    for at in (0.1, 30.0, 60.0):
        assert m.handle(NodeSaid("n", Loading(1, 2000)), at) == []
        assert m.phase == "running"
        assert m.next_deadline() == m.spec.deadline
    assert m.record.attempts[0].loads == {"n": LoadWaited(2000, None)}
    m.handle(NodeSaid("n", Accepted(1, 10, 0)), 62.1)
    assert m.record.attempts[0].loads == {"n": LoadWaited(2000, pytest.approx(62_000.0))}
    assert text_of(m.handle(Tokens("n", entry(1, 0)), 62.2)) == wanted(1)
    assert m.record.ttft_ms == pytest.approx(62_200.0)


def test_an_estimate_beyond_the_deadline_fails_over() -> None:
    m = machine()
    m.handle(cold("n", "n", 2.0, 2.0), 0.0)
    assert m.handle(NodeSaid("n", Loading(1, 60_000)), 1.0) == []
    effects = m.handle(NodeSaid("n", Loading(1, 60_000)), 50.0)
    assert effects[:2] == [SendCancel("n", 1), CloseStream(1)]
    (replan,) = effects[2:]
    assert isinstance(replan, Replan)
    assert replan.broken.avoid_nodes == {NodeStart("n", "")}
    record = m.record.attempts[0]
    assert (record.outcome, record.loads) == ("not_loaded", {"n": LoadWaited(60_000, None)})
    assert submits(m.handle(routed(2), 50.0)) == [
        ("p", "prefill"),
        ("d", "decode"),
    ]


def test_a_node_that_dies_while_it_loads_fails_over() -> None:
    m = machine()
    m.handle(cold("n", "n", 2.0, 2.0), 0.0)
    m.handle(NodeSaid("n", Loading(1, 2000)), 0.1)
    effects = m.handle(LinkLost("n"), 0.5)
    assert isinstance(effects[-1], Replan)


def test_a_node_that_cannot_load_it_after_all_is_left_and_tells_the_client_when() -> None:
    m = machine()
    for attempt in range(4):
        m.handle(replace(cold("n", "n", 2.0, 2.0), stream=attempt), 0.0)
        m.handle(NodeSaid("n", Loading(attempt, 2000)), 0.1)
        refused = Refused(attempt, "not_loaded", "no memory", True, 7000)
        effects = m.handle(NodeSaid("n", refused), 0.2)
    error = next(e.error for e in effects if isinstance(e, EmitError))
    assert (error.code, error.retry_after_s) == ("not_loaded", 7.0)


def test_the_deadline_ends_the_wait() -> None:
    m = machine()
    m.handle(cold("n", "n", 2.0, 2.0), 0.0)
    m.handle(NodeSaid("n", Loading(1, 2000)), 0.1)
    effects = m.handle(Tick(), m.spec.deadline)
    assert SendCancel("n", 1) in effects
    error = next(e.error for e in effects if isinstance(e, EmitError))
    assert error.code == "deadline_exceeded"


def test_the_prefill_leg_is_held_until_a_cold_decode_leg_has_its_blocks() -> None:
    m = machine()
    assert submits(m.handle(cold(decode_s=3.0), 0.0)) == [("d", "decode")]
    m.handle(NodeSaid("d", Loading(1, 3000)), 0.1)
    (submit,) = m.handle(NodeSaid("d", Accepted(1, 10, 0)), 3.0)
    assert isinstance(submit, SendSubmit)
    assert (submit.node, submit.message.leg) == ("p", "prefill")
    assert submit.message.transfer is not None
    assert (submit.message.transfer.peer, submit.message.transfer.address) == ("d", "")
    assert submit.message.deadline_remaining_ms == 97_000
    m.handle(Tokens("p", entry(1, 0)), 3.2)
    assert text_of(m.handle(Tokens("d", entry(1, 1)), 3.3)) == wanted(2)[len(wanted(1)) :]
    m.handle(NodeSaid("p", Finished(1, "handoff", 1, 0, 0, None)), 3.3)
    m.handle(NodeSaid("d", Finished(1, "stop", 2, 0, 0, None)), 3.4)
    assert m.phase == "done"


def test_a_cold_prefill_node_is_told_to_load_while_its_leg_is_held() -> None:
    m = machine()
    warm, submit = m.handle(cold(prefill_s=2.0, decode_s=3.0), 0.0)
    hold_ms = int((HOLD_LOADS * 3.0 + HOLD_MORE_S) * 1e3)
    assert warm == SendWarm("p", Warm("m", hold_ms))
    assert submits([submit]) == [("d", "decode")]
    m.handle(NodeSaid("d", Loading(1, 3000)), 0.1)
    m.handle(NodeSaid("d", Accepted(1, 10, 0)), 3.0)
    m.handle(NodeSaid("p", Loading(1, 500)), 3.1)
    m.handle(NodeSaid("p", Accepted(1, 10, 0)), 3.5)
    assert m.record.attempts[0].loads == {
        "d": LoadWaited(3000, pytest.approx(2900.0)),
        "p": LoadWaited(500, pytest.approx(400.0)),
    }


def test_what_a_held_prefill_leg_has_left_is_known() -> None:
    """3 s of its own load and 1 s of computing; 2 s of the load pass while it is held."""
    m = machine()
    routed = cold(prefill_s=3.0, decode_s=2.0)
    route = replace(routed.route, reasons=(Reason("load", 3.0, ""), Reason("prefill", 1.0, "")))
    m.handle(replace(routed, route=route), 0.0)
    m.handle(NodeSaid("d", Accepted(1, 10, 0)), 2.0)
    assert m.handle(NodeSaid("d", Accepted(1, 10, 0)), 2.1) == []  # said twice, begun once
    (*_, replan) = m.handle(LinkLost("d"), 2.5)
    assert isinstance(replan, Replan)
    assert replan.broken.running is not None
    assert replan.broken.running.remaining_s == pytest.approx(1.5)


def test_no_model_is_held_beyond_the_request() -> None:
    warm, _ = machine().handle(cold(prefill_s=80.0, decode_s=80.0), 10.0)
    assert isinstance(warm, SendWarm)
    assert warm.message.hold_ms == 90_000


def test_a_cold_prefill_node_alone_holds_nobody_back() -> None:
    effects = machine().handle(cold(prefill_s=2.0), 0.0)
    assert submits(effects) == [("p", "prefill"), ("d", "decode")]


@pytest.mark.parametrize("end", ["refused", "lost", "gone", "deadline"])
def test_a_held_leg_that_never_began_is_never_cancelled(end: str) -> None:
    m = machine()
    m.handle(cold(decode_s=3.0), 0.0)
    ends = {
        "refused": NodeSaid("d", Refused(1, "not_loaded", "no memory", True, 0)),
        "lost": LinkLost("d"),
        "gone": ClientGone(),
        "deadline": Tick(),
    }
    at = m.spec.deadline if end == "deadline" else 1.0
    effects = m.handle(ends[end], at)
    assert not [e for e in effects if isinstance(e, (SendCancel, SendSubmit)) and e.node == "p"]
    assert CloseStream(1) in effects


def test_a_leg_that_was_told_to_stop_and_still_loads_is_told_again() -> None:
    """Its long Submit was overtaken by the Cancel."""
    m = machine()
    m.handle(routed(1), 0.0)
    m.handle(NodeSaid("p", Accepted(1, 10, 0)), 0.0)
    assert SendCancel("d", 1) in m.handle(NodeSaid("p", Detached(1, 1, "link_lost", "")), 0.1)
    assert m.handle(NodeSaid("d", Loading(1, 100)), 0.2) == [SendCancel("d", 1)]
