"""The request machine's transitions when legs break: keep, salvage, wait, avoid, give up."""

from __future__ import annotations

import pytest

from router.request.events import (
    CloseLeg,
    CloseStream,
    Done,
    Effect,
    EmitError,
    EmitFinish,
    EmitText,
    LinkLost,
    NodeSaid,
    Replan,
    RequestSpec,
    Routed,
    SendCancel,
    SendRetarget,
    SendSubmit,
    Tick,
    Tokens,
    Unroutable,
)
from router.request.machine import RequestMachine
from router.request.patience import MAX_ATTEMPTS_STREAMING, WAIT_FIRST_S, WAIT_STREAMING_S
from router.request.record import MAX_ATTEMPTS_KEPT, RequestRecord
from router.routing.avoidance import AVOID_ENGINE_S, AVOID_S, NodeStart
from router.routing.policy import Route
from router.routing.recovery import Broken, Recovery, RunningPrefill
from tests.fakes.fake_answer import answer_ids
from wire.errors import OverloadError
from wire.messages import (
    Accepted,
    Detached,
    Failed,
    Finished,
    Refused,
    Retarget,
    Sampling,
    StepEntry,
    TextInput,
    Transfer,
)

PROMPT = TextInput("p")
ANSWER = answer_ids(PROMPT, 40)
NO_ROUTE = OverloadError("none", code="no_route", retry_after_s=1.0)


def machine(salvage_s: float = 0.5, deadline: float = 1000.0) -> RequestMachine:
    sampling = Sampling(None, 0.0, 1.0, 7, [], False)
    spec = RequestSpec("r1", "m", "", PROMPT, sampling, [], deadline, salvage_s=salvage_s)
    return RequestMachine(spec, RequestRecord("r1", "m", "", "router"), 0.0)


def routed(stream: int, prefill: str = "p", decode: str = "d", keeps: bool = False) -> Routed:
    route = Route(prefill, decode, "x", "y", 0.1, (), f"{prefill}1", f"{decode}1")
    kind = Recovery("retarget", 0.1) if keeps else None
    return Routed(route, stream, bytes([stream]) * 16, "127.0.0.1:9", keeps, kind)


def tokens(node: str, stream: int, index: int, count: int = 1) -> Tokens:
    return Tokens(node, StepEntry(stream, index, ANSWER[index : index + count], b"x" * count))


def paired(first_token: bool = False, salvage_s: float = 0.5) -> RequestMachine:
    """A machine whose first attempt runs on p and d, both holding their blocks."""
    m = machine(salvage_s)
    m.handle(routed(1), 0.0)
    m.handle(NodeSaid("p", Accepted(1, 30, 0)), 0.0)
    m.handle(NodeSaid("d", Accepted(1, 30, 0)), 0.0)
    if first_token:
        m.handle(tokens("p", 1, 0), 0.1)
    return m


def asked(effects: list[Effect]) -> Broken:
    """What a route is looked for with."""
    assert isinstance(effects[-1], Replan)
    return effects[-1].broken


IN_FLIGHT = [
    NodeSaid("d", Failed(1, "engine_died", "", True)),
    NodeSaid("d", Refused(1, "out_of_blocks", "", True, 0)),
    LinkLost("d"),
]


# ---- another decode node -----------------------------------------------------------------------


@pytest.mark.parametrize("event", IN_FLIGHT)
@pytest.mark.parametrize("first_token", [False, True])
def test_a_decode_leg_lost_in_flight_leaves_the_prefill_leg_alone(
    event: NodeSaid | LinkLost, first_token: bool
) -> None:
    m = paired(first_token)
    effects = m.handle(event, 0.2)
    assert effects[:-1] == [CloseLeg("d", 1)]
    assert asked(effects).running == RunningPrefill(NodeStart("p", "p1"), 0.0, frozenset())


def test_the_prefill_leg_hands_over_to_another_decode_node() -> None:
    m = paired(first_token=True)
    m.handle(LinkLost("d"), 0.2)
    submit, retarget = m.handle(routed(2, decode="e", keeps=True), 0.2)
    assert isinstance(submit, SendSubmit)
    message = submit.message
    assert (submit.node, message.leg, message.stream, message.attempt) == ("e", "decode", 1, 2)
    assert message.forced_ids == []  # those of the prefill leg, not what it has said since
    assert message.transfer == Transfer(bytes([2]) * 16, "p", "")
    to_e = Transfer(bytes([2]) * 16, "e", "127.0.0.1:9")
    assert retarget == SendRetarget("p", Retarget(1, 2, to_e))
    assert m.handle(tokens("e", 1, 1), 0.3) == [EmitText(b"x", 2)]
    first, second = m.record.attempts
    assert (first.outcome, second.number) == ("link_lost", 2)
    assert second.recovery == Recovery("retarget", 0.1)


def test_a_prefill_leg_that_nobody_takes_over_gives_its_blocks_back() -> None:
    m = paired(first_token=True)
    m.handle(LinkLost("d"), 0.2)
    for number, node in ((2, "e"), (3, "f")):
        m.handle(routed(number, decode=node, keeps=True), float(number))
        effects = m.handle(LinkLost(node), number + 0.5)
    assert effects[:-1] == [SendCancel("p", 1), CloseStream(1)]
    assert asked(effects).running is None


def test_a_decode_node_that_spoke_is_not_replaced_under_the_same_prefill() -> None:
    m = paired(first_token=True)
    m.handle(tokens("d", 1, 1), 0.2)
    effects = m.handle(LinkLost("d"), 0.3)
    assert effects[:-1] == [SendCancel("p", 1), CloseStream(1)]
    assert asked(effects).running is None
    assert asked(effects).relayed == 2


def test_a_detached_prefill_leg_cancels_its_decode_leg_and_bars_its_node() -> None:
    m = paired()
    effects = m.handle(NodeSaid("p", Detached(1, 1, "transfer_failed", "")), 0.2)
    assert effects[:-1] == [SendCancel("d", 1)]
    running = asked(effects).running
    assert running is not None
    assert running.barred == {"d"}  # it owes an end under this number
    m.handle(routed(2, decode="e", keeps=True), 0.2)
    # The old node's last words end its old leg, not the new one, and what it kept is remembered.
    assert m.handle(tokens("d", 1, 1), 0.3) == []
    end = Finished(1, "cancelled", 0, 0, 0, None, 16)
    assert m.handle(NodeSaid("d", end), 0.3) == [CloseLeg("d", 1)]
    broken = asked(m.handle(LinkLost("e"), 0.4))
    assert broken.kept == {NodeStart("d", "d1"): 16}
    assert broken.running is not None
    assert broken.running.barred == frozenset()  # may serve under this number again


def test_late_words_about_the_old_transfer_are_stale() -> None:
    m = paired()
    m.handle(LinkLost("d"), 0.2)
    m.handle(routed(2, decode="e", keeps=True), 0.2)
    before = m.record.stale_messages
    assert m.handle(NodeSaid("p", Detached(1, 1, "transfer_failed", "")), 0.3) == []
    assert m.handle(NodeSaid("d", Failed(1, "engine_died", "", True)), 0.3) == []
    assert m.record.stale_messages == before + 2
    effects = m.handle(NodeSaid("p", Detached(1, 2, "transfer_failed", "")), 0.4)
    assert effects[0] == SendCancel("e", 1)


def test_the_same_node_may_serve_again_once_it_is_back() -> None:
    m = paired(first_token=True)
    m.handle(LinkLost("d"), 0.2)
    submit, _ = m.handle(routed(2, decode="d", keeps=True), 0.3)
    assert isinstance(submit, SendSubmit)
    assert (submit.node, submit.message.attempt) == ("d", 2)
    assert m.handle(tokens("d", 1, 1), 0.4) == [EmitText(b"x", 2)]


def test_an_overtaken_cancel_is_said_again() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    m.handle(NodeSaid("p", Detached(1, 1, "transfer_failed", "")), 0.1)
    assert m.handle(NodeSaid("d", Accepted(1, 30, 0)), 0.2) == [SendCancel("d", 1)]


def test_a_lost_report_lets_the_prefill_leg_go() -> None:
    m = paired(first_token=True)
    m.handle(tokens("d", 1, 1), 0.2)
    effects = m.handle(NodeSaid("p", Detached(1, 1, "transfer_failed", "")), 0.3)
    assert effects == [SendCancel("p", 1)]
    assert m.handle(tokens("d", 1, 2), 0.4) == [EmitText(b"x", 3)]


def test_a_prefill_leg_that_ended_meanwhile_is_not_retargeted() -> None:
    m = paired()
    assert asked(m.handle(LinkLost("d"), 0.2)).running is not None
    m.handle(LinkLost("p"), 0.2)  # between question and answer
    effects = m.handle(routed(2, decode="e", keeps=True), 0.2)
    assert asked(effects).running is None


def test_a_kept_prefill_leg_is_cancelled_when_a_new_plan_is_cheaper() -> None:
    m = paired()
    m.handle(LinkLost("d"), 0.2)
    effects = m.handle(routed(2, "q", "e"), 0.2)
    assert effects[:2] == [SendCancel("p", 1), CloseStream(1)]
    assert [e.message.stream for e in effects if isinstance(e, SendSubmit)] == [2, 2]


# ---- while a route is looked for ---------------------------------------------------------------


def test_the_kept_leg_is_heard_while_waiting_and_may_even_finish() -> None:
    m = paired()
    m.handle(LinkLost("d"), 0.2)
    m.handle(Unroutable(NO_ROUTE), 0.2)
    assert m.phase == "waiting"
    assert EmitText(b"x", 1) in m.handle(tokens("p", 1, 0), 0.25)
    effects = m.handle(NodeSaid("p", Finished(1, "stop", 1, 0, 0, None)), 0.3)
    assert [type(e) for e in effects] == [EmitFinish, CloseStream, Done]


def test_losing_the_kept_leg_while_waiting_changes_only_the_next_question() -> None:
    m = paired()
    m.handle(LinkLost("d"), 0.2)
    m.handle(Unroutable(NO_ROUTE), 0.2)
    assert m.handle(LinkLost("p"), 0.25) == [CloseStream(1)]
    assert asked(m.handle(Tick(), m.next_deadline())).running is None


@pytest.mark.parametrize(
    ("first_token", "wait_s"), [(False, WAIT_FIRST_S), (True, WAIT_STREAMING_S)]
)
def test_a_wait_for_a_route_is_bounded_and_ends_with_the_last_error(
    first_token: bool, wait_s: float
) -> None:
    m = paired(first_token)
    now, pauses = 0.2, []
    effects = [*m.handle(LinkLost("d"), now), *m.handle(LinkLost("p"), now)]
    assert sum(isinstance(e, Replan) for e in effects) == 1
    effects = m.handle(Unroutable(NO_ROUTE), now)
    while m.phase == "waiting":
        pauses.append(m.next_deadline() - now)
        now = m.next_deadline()
        asked(m.handle(Tick(), now))
        effects = m.handle(Unroutable(NO_ROUTE), now)
    assert pauses[:5] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0])
    assert now == pytest.approx(0.2 + wait_s)
    (error,) = [e.error for e in effects if isinstance(e, EmitError)]
    assert error.code == "link_lost"


def test_a_wait_never_passes_the_deadline() -> None:
    m = machine(deadline=0.25)
    m.handle(routed(1, "n", "n"), 0.0)
    m.handle(LinkLost("n"), 0.2)
    m.handle(Unroutable(NO_ROUTE), 0.2)
    assert m.next_deadline() == 0.25
    (error,) = [e.error for e in m.handle(Tick(), 0.25) if isinstance(e, EmitError)]
    assert error.code == "deadline_exceeded"


def test_a_final_refusal_ends_at_once_with_its_own_words() -> None:
    m = paired()
    m.handle(LinkLost("d"), 0.2)
    spent = OverloadError("spent", retry_after_s=1.0)
    effects = m.handle(Unroutable(spent, final=True), 0.2)
    assert effects == [SendCancel("p", 1), CloseStream(1), EmitError(spent), Done()]


# ---- salvage -----------------------------------------------------------------------------------


def test_a_dead_prefill_waits_for_what_the_decode_node_kept() -> None:
    m = paired()
    assert m.handle(LinkLost("p"), 1.0) == [SendCancel("d", 1)]
    assert (m.phase, m.next_deadline()) == ("salvaging", 1.5)
    end = Finished(1, "cancelled", 0, 0, 0, None, 16)
    effects = m.handle(NodeSaid("d", end), 1.1)
    assert effects[:-1] == [CloseLeg("d", 1), CloseStream(1)]
    assert asked(effects).kept == {NodeStart("d", "d1"): 16}


@pytest.mark.parametrize("event", [LinkLost("d"), Tick(), NodeSaid("d", Failed(1, "x", "", True))])
def test_a_salvage_ends_without_an_answer_too(event: LinkLost | Tick | NodeSaid) -> None:
    m = paired()
    m.handle(LinkLost("p"), 1.0)
    broken = asked(m.handle(event, m.next_deadline()))
    assert broken.kept == {}
    assert broken.running is None


def test_a_decode_node_that_failed_first_has_said_what_it_kept() -> None:
    m = paired()
    broken = asked(m.handle(NodeSaid("d", Failed(1, "transfer_failed", "", True, 16)), 0.2))
    assert broken.kept == {NodeStart("d", "d1"): 16}


@pytest.mark.parametrize("why", ["not worth it", "nothing sent", "refused", "spoke"])
def test_no_salvage_where_there_is_nothing_to_wait_for(why: str) -> None:
    if why == "not worth it":
        m = paired(salvage_s=0.0)
        effects = m.handle(LinkLost("p"), 0.2)
    elif why == "nothing sent":
        m = machine()
        m.handle(routed(1), 0.0)
        effects = m.handle(LinkLost("p"), 0.2)
    elif why == "refused":
        m = machine()
        m.handle(routed(1), 0.0)
        m.handle(NodeSaid("d", Accepted(1, 30, 0)), 0.1)
        effects = m.handle(NodeSaid("p", Refused(1, "overloaded", "", True, 0)), 0.2)
    else:
        m = paired()
        m.handle(tokens("d", 1, 1), 0.2)  # the first token is still missing
        effects = m.handle(LinkLost("p"), 0.2)
    assert SendCancel("d", 1) in effects
    assert asked(effects).running is None


# ---- patience and avoidance --------------------------------------------------------------------


def test_progress_resets_the_count_of_attempts() -> None:
    m = machine()
    for number in range(1, 21):
        m.handle(routed(number, "n", "n"), 0.0)
        m.handle(tokens("n", number, number - 1), 0.0)
        assert asked(m.handle(LinkLost("n"), 0.0)).relayed == number
    for number in range(21, 20 + MAX_ATTEMPTS_STREAMING):
        m.handle(routed(number, "n", "n"), 0.0)
        asked(m.handle(LinkLost("n"), 0.0))
    m.handle(routed(99, "n", "n"), 0.0)
    effects = m.handle(LinkLost("n"), 0.0)
    assert [type(e) for e in effects] == [CloseStream, EmitError, Done]


def test_remembered_attempts_are_bounded() -> None:
    m = machine()
    for number in range(1, MAX_ATTEMPTS_KEPT + 6):
        m.handle(routed(number, "n", "n"), 0.0)
        m.handle(tokens("n", number, number - 1), 0.0)
        m.handle(LinkLost("n"), 0.0)
    assert len(m.record.attempts) == MAX_ATTEMPTS_KEPT
    assert m.record.attempts_forgotten == 5
    assert m.record.attempts[-1].number == MAX_ATTEMPTS_KEPT + 5


def test_a_stream_waits_for_room_as_it_waits_for_a_route() -> None:
    """A mesh without room may refuse it any number of times, for as long as it may wait."""
    m = machine()
    m.handle(routed(1, "n", "n"), 0.0)
    m.handle(tokens("n", 1, 0), 0.0)
    asked(m.handle(LinkLost("n"), 0.0))
    now, number, effects = 0.0, 1, list[Effect]()
    while m.phase != "done":
        number += 1
        m.handle(routed(number, "n", "n"), now)
        effects = m.handle(NodeSaid("n", Refused(number, "out_of_blocks", "", True, 0)), now)
        if m.phase == "waiting":
            now = m.next_deadline()
            asked(m.handle(Tick(), now))
    assert WAIT_STREAMING_S <= now <= WAIT_STREAMING_S + 1.0
    assert 4 < number < 80
    (error,) = [e.error for e in effects if isinstance(e, EmitError)]
    assert error.code == "out_of_blocks"


@pytest.mark.parametrize(
    ("code", "for_s"), [("peer_failed", AVOID_S), ("engine_died", AVOID_ENGINE_S)]
)
def test_a_node_is_avoided_in_its_incarnation_and_for_a_time(code: str, for_s: float) -> None:
    m = machine()
    m.handle(routed(1, "n", "n"), 0.0)
    m.handle(tokens("n", 1, 0), 0.0)
    broken = asked(m.handle(NodeSaid("n", Failed(1, code, "", True)), 1.0))
    assert broken.avoid_nodes == {NodeStart("n", "n1")}
    m.handle(routed(2, "o", "o"), 1.0)
    later = asked(m.handle(LinkLost("o"), 1.0 + for_s))
    assert later.avoid_nodes == {NodeStart("o", "o1")}


def test_a_refusal_that_no_node_would_lift_is_not_retried() -> None:
    m = paired()
    refused = Refused(1, "context_length_exceeded", "", False, 0)
    effects = m.handle(NodeSaid("p", refused), 0.2)
    assert not any(isinstance(e, Replan) for e in effects)
    assert [type(e) for e in effects[-2:]] == [EmitError, Done]
