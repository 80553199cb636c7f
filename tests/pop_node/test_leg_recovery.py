"""A leg whose transfer breaks: what it keeps, what it says, and where it goes on."""

from __future__ import annotations

import pytest
from leg_world import REPORT, make_leg, prepared, said

from pop_node.engine import messages as engine
from pop_node.legs import events as ev
from pop_node.legs import leg as legs
from wire.errors import DeadlineError, PeerError, TransferError
from wire.messages import Detached, Failed, Finished, Transfer

OLD, NEW = b"t" * 16, b"n" * 16
ELSEWHERE = Transfer(NEW, "other", "127.0.0.1:2")
RETARGETED = ev.Retargeted(2, ELSEWHERE)
LOST = TransferError("the link is gone", code="transfer_timeout")

STATES = ["queued", "running", "computed", "handoff"]


def prefill_in(state: str, version: int = 2) -> legs.Leg:
    leg = make_leg("prefill", forced=[30], version=version)
    leg.handle(prepared())
    if state != "queued":
        leg.handle(engine.Allocated(1, 0))
    if state in ("computed", "handoff"):
        leg.handle(engine.PrefillDone(1, 0.0, 1.0))
    if state == "handoff":
        leg.handle(engine.Token(1, 1, 40, "handoff"))
    return leg


def opening_again(state: str) -> list[ev.Effect]:
    effects: list[ev.Effect] = [ev.ToEngine(engine.Retarget(OLD, NEW))]
    effects.append(ev.OpenTransfer([10, 11, 12, 30]))
    if state != "queued":
        effects.append(ev.ComputeStarted())
    if state in ("computed", "handoff"):
        effects.append(ev.ComputeEnded())
    if state == "handoff":
        effects.append(ev.CommitTransfer([40]))
    return effects


@pytest.mark.parametrize("state", STATES)
def test_a_detached_leg_goes_on_to_another_decode_node(state: str) -> None:
    leg = prefill_in(state)
    detached = Detached(5, 1, "transfer_timeout", "the link is gone")
    assert leg.handle(ev.TransferFailed(LOST)) == [ev.Say(detached), ev.AwaitRetarget()]
    assert leg.handle(RETARGETED) == [ev.StopWaiting(), *opening_again(state)]
    assert (leg.submit.attempt, leg.submit.transfer) == (2, ELSEWHERE)


@pytest.mark.parametrize("state", STATES)
def test_a_retarget_ends_a_transfer_that_still_goes_on(state: str) -> None:
    leg = prefill_in(state)
    cancel, *rest = leg.handle(RETARGETED)
    assert isinstance(cancel, ev.CancelTransfer)
    assert cancel.transfer == OLD
    assert rest == opening_again(state)


def test_a_retarget_before_the_prompt_is_known_only_changes_the_address() -> None:
    leg = make_leg("prefill", version=2)
    assert leg.handle(RETARGETED) == []
    add, opened = leg.handle(prepared())
    assert add.message.transfer == NEW
    assert opened == ev.OpenTransfer([10, 11, 12])
    assert leg.transfer_id == NEW


def test_tokens_that_come_while_it_is_detached_are_committed_to_the_next_one() -> None:
    leg = prefill_in("running")
    leg.handle(ev.TransferFailed(LOST))
    assert leg.handle(engine.PrefillDone(1, 0.0, 1.0)) == [ev.RecordPrefix(3, 3)]
    (emit,) = leg.handle(engine.Token(1, 1, 40, "handoff"))
    assert emit.entry.ids == [40]
    assert leg.handle(RETARGETED) == [ev.StopWaiting(), *opening_again("handoff")]
    effects = leg.handle(ev.TransferDone(REPORT))
    assert said(effects) == [Finished(5, "handoff", 2, 0.0, 1.0, REPORT)]
    assert effects[-1] == ev.ToEngine(engine.Release(NEW))


def test_an_answer_that_ends_while_it_is_detached_needs_nobody() -> None:
    leg = prefill_in("computed")
    leg.handle(ev.TransferFailed(LOST))
    effects = leg.handle(engine.Token(1, 1, 41, "length"))
    assert said(effects) == [Finished(5, "length", 2, 0.0, 1.0, None)]
    assert ev.StopWaiting() in effects
    assert leg.handle(RETARGETED) == []


def test_it_can_break_and_go_on_many_times() -> None:
    leg = prefill_in("handoff")
    for attempt in range(2, 6):
        leg.handle(ev.TransferFailed(LOST))
        again = ev.Retargeted(attempt, Transfer(bytes([attempt]) * 16, "d", "127.0.0.1:3"))
        assert leg.handle(again)[-1] == ev.CommitTransfer([40])
    (say, wait) = leg.handle(ev.TransferFailed(LOST))
    assert say.message.attempt == 5
    assert wait == ev.AwaitRetarget()


@pytest.mark.parametrize("state", STATES)
def test_waiting_ends_with_the_error_of_the_transfer(state: str) -> None:
    leg = prefill_in(state)
    leg.handle(ev.TransferFailed(LOST))
    effects = leg.handle(ev.WaitedEnough())
    assert said(effects) == [Failed(5, "transfer_timeout", "the link is gone", True)]
    assert ev.ToEngine(engine.Drop(1)) in effects
    assert leg.handle(RETARGETED) == []


def test_a_cancel_while_it_is_detached_reaches_the_engine_at_once() -> None:
    leg = prefill_in("handoff")
    leg.handle(ev.TransferFailed(LOST))
    effects = leg.handle(ev.Cancelled())
    assert said(effects)[0].reason == "cancelled"
    assert ev.ToEngine(engine.Drop(1)) in effects
    assert ev.StopWaiting() in effects


@pytest.mark.parametrize(
    ("version", "error"),
    [
        (1, LOST),
        (2, TransferError("ids differ", code="prompt_mismatch")),
        (2, TransferError("laid out otherwise", code="spec_mismatch")),
        (2, TransferError("12001 ids", retryable=False)),
        (2, DeadlineError("too late")),
    ],
)
def test_what_no_other_decode_node_cures_ends_the_leg(version: int, error: PeerError) -> None:
    leg = prefill_in("handoff", version)
    (failed,) = said(leg.handle(ev.TransferFailed(error)))
    assert failed == Failed(5, error.code, error.message, error.retryable)


@pytest.mark.parametrize("kind", ["decode", "both"])
def test_only_prefill_legs_are_retargeted(kind: str) -> None:
    leg = make_leg(kind, version=2)
    leg.handle(prepared())
    leg.handle(engine.Allocated(1, 0))
    assert leg.handle(RETARGETED) == []
    assert leg.submit.attempt == 1


# ---- what stays of a hand-over -----------------------------------------------------------------


def receiving() -> legs.Leg:
    leg = make_leg("decode", forced=[30], version=2)
    leg.handle(prepared())
    leg.handle(engine.Allocated(1, 0))
    return leg


ENDS = {
    "transfer": ev.TransferFailed(LOST, 4),
    "router": ev.Cancelled(4),
    "deadline": ev.Broken(DeadlineError("late"), kept_tokens=4),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_decode_leg_says_what_it_keeps(how: str) -> None:
    effects = receiving().handle(ENDS[how])
    (ending,) = said(effects)
    assert ending.kept_tokens == 4
    assert ev.ToEngine(engine.Drop(1, 4)) in effects
    assert ev.RecordPrefix(3, 3) in effects  # the forced ids are no part of the prompt


def test_a_part_of_the_prompt_is_recorded_as_a_part() -> None:
    effects = receiving().handle(ev.TransferFailed(LOST, 2))
    assert ev.RecordPrefix(3, 2) in effects


@pytest.mark.parametrize("state", ["queued", "committed", "engine gone"])
def test_nothing_is_kept_where_nothing_came_in(state: str) -> None:
    leg = make_leg("decode", version=2)
    leg.handle(prepared())
    if state != "queued":
        leg.handle(engine.Allocated(1, 0))
    if state == "committed":
        leg.handle(ev.TransferCommitted([40]))
    gone = state == "engine gone"
    effects = leg.handle(ev.Broken(PeerError("x"), engine_gone=gone, kept_tokens=4))
    (ending,) = said(effects)
    assert ending.kept_tokens == 0
    assert not any(isinstance(effect, ev.RecordPrefix) for effect in effects)
