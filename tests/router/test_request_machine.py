"""The request machine against simulated nodes: exactly once, in order, one end, no leftovers."""

from __future__ import annotations

import pytest

from router.request.events import (
    CloseStream,
    Done,
    Effect,
    EmitError,
    EmitFinish,
    EmitHeaders,
    EmitText,
    Event,
    LinkLost,
    NodeSaid,
    Replan,
    RequestSpec,
    Routed,
    SendCancel,
    SendSubmit,
    Tick,
    Tokens,
)
from router.request.machine import SETTLE_S, RequestMachine
from router.request.patience import MAX_ATTEMPTS
from router.request.record import RequestRecord
from router.request.token_relay import MAX_WAITING_ENTRIES
from router.routing.avoidance import NodeStart, Pair
from router.routing.policy import Route
from tests.fakes.fake_answer import answer_ids
from wire.messages import (
    Accepted,
    Failed,
    Finished,
    Refused,
    Sampling,
    StepEntry,
    TextInput,
    TransferReport,
)

PROMPT = TextInput("p")
REPORT = TransferReport(10, 10, 5, 1.0, 1.0, 0.1, 0.1)
ANSWER = answer_ids(PROMPT, 12)


def spec(max_tokens: int | None = None, deadline: float = 100.0) -> RequestSpec:
    sampling = Sampling(max_tokens, 0.0, 1.0, 7, [], False)
    return RequestSpec("r1", "m", "", PROMPT, sampling, [], deadline)


def machine(max_tokens: int | None = None) -> RequestMachine:
    record = RequestRecord("r1", "m", "", "router")
    return RequestMachine(spec(max_tokens), record, now=0.0)


def route(prefill: str, decode: str) -> Route:
    return Route(prefill, decode, "x", "y", 0.1, ())


def routed(stream: int, prefill: str = "p", decode: str = "d") -> Routed:
    return Routed(route(prefill, decode), stream, bytes(16), "127.0.0.1:9")


def entry(stream: int, index: int, count: int = 1) -> StepEntry:
    ids = ANSWER[index : index + count]
    return StepEntry(stream, index, ids, b"".join(b"<%d>" % i for i in ids))


def text_of(effects: list[Effect]) -> bytes:
    return b"".join(e.text for e in effects if isinstance(e, EmitText))


def wanted(count: int) -> bytes:
    return b"".join(b"<%d>" % i for i in ANSWER[:count])


def test_both_legs_are_submitted_at_once_with_one_stream() -> None:
    effects = machine().handle(routed(5), 1.0)
    submits = [e for e in effects if isinstance(e, SendSubmit)]
    assert [(s.node, s.message.leg) for s in submits] == [("p", "prefill"), ("d", "decode")]
    assert {s.message.stream for s in submits} == {5}
    transfers = [s.message.transfer for s in submits]
    assert [t.peer for t in transfers if t] == ["d", "p"]
    assert [t.address for t in transfers if t] == ["127.0.0.1:9", ""]
    assert submits[0].message.deadline_remaining_ms == 99_000


def test_one_node_gets_one_submit_and_no_transfer() -> None:
    (submit,) = machine().handle(routed(5, "n", "n"), 1.0)
    assert isinstance(submit, SendSubmit)
    assert (submit.message.leg, submit.message.transfer) == ("both", None)


def test_decode_token_waits_for_the_first_one() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    assert m.handle(Tokens("d", entry(1, 1)), 0.1) == []
    effects = m.handle(Tokens("p", entry(1, 0)), 0.2)
    assert effects[0] == EmitHeaders("p", "d")
    assert text_of(effects) == wanted(2)
    assert m.record.ttft_ms == pytest.approx(200.0)


def test_decode_finish_waits_for_the_first_token_then_settles() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    m.handle(NodeSaid("p", Accepted(1, 30, 10)), 0.0)
    m.handle(Tokens("d", entry(1, 1)), 0.1)
    assert m.handle(NodeSaid("d", Finished(1, "stop", 2, 0, 0, None)), 0.2) == []
    effects = m.handle(Tokens("p", entry(1, 0)), 0.3)
    finish = effects[-1]
    assert isinstance(finish, EmitFinish)
    assert (finish.usage.prompt_tokens, finish.usage.cached_tokens) == (30, 10)
    assert finish.usage.completion_tokens == 2
    assert m.phase == "settling"
    last = m.handle(NodeSaid("p", Finished(1, "handoff", 1, 2.0, 3.0, REPORT)), 0.4)
    assert last == [CloseStream(1), Done()]
    assert m.record.transfer == REPORT


def test_settling_ends_by_itself() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    m.handle(Tokens("p", entry(1, 0)), 0.1)
    m.handle(Tokens("d", entry(1, 1)), 0.1)
    m.handle(NodeSaid("d", Finished(1, "stop", 2, 0, 0, None)), 0.2)
    assert m.next_deadline() == pytest.approx(0.2 + SETTLE_S)
    assert m.handle(Tick(), m.next_deadline()) == [SendCancel("p", 1), CloseStream(1), Done()]


def test_finish_at_prefill_cancels_decode() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    m.handle(Tokens("p", entry(1, 0)), 0.1)
    effects = m.handle(NodeSaid("p", Finished(1, "stop", 1, 0, 0, None)), 0.2)
    assert isinstance(effects[0], EmitFinish)
    assert effects[1:] == [SendCancel("d", 1), CloseStream(1), Done()]


def test_decode_may_learn_of_a_finish_at_prefill_first() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    assert m.handle(NodeSaid("d", Failed(1, "answer_complete", "", True)), 0.1) == []
    m.handle(Tokens("p", entry(1, 0)), 0.2)
    effects = m.handle(NodeSaid("p", Finished(1, "length", 1, 0, 0, None)), 0.3)
    assert [type(e) for e in effects] == [EmitFinish, CloseStream, Done]


def test_continuation_forces_the_relayed_ids() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    m.handle(Tokens("p", entry(1, 0)), 0.1)
    m.handle(Tokens("d", entry(1, 1, 3)), 0.2)
    effects = m.handle(LinkLost("d"), 0.3)
    assert SendCancel("p", 1) in effects
    again = effects[-1]
    assert isinstance(again, Replan)
    assert again.broken.avoid_nodes == {NodeStart("d", "")}
    assert (again.broken.avoid_pairs, again.broken.relayed) == (frozenset(), 4)
    submits = m.handle(routed(2, "p", "e"), 0.4)
    assert all(isinstance(s, SendSubmit) and s.message.forced_ids == ANSWER[:4] for s in submits)
    assert m.handle(Tokens("d", entry(1, 4)), 0.5) == []  # the old attempt is stale
    assert m.handle(Tokens("p", entry(2, 4)), 0.5) == [EmitText(entry(2, 4).text, 5)]


def test_losing_the_prefill_link_after_decode_spoke_changes_nothing() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    m.handle(Tokens("p", entry(1, 0)), 0.1)
    m.handle(Tokens("d", entry(1, 1)), 0.2)
    assert m.handle(LinkLost("p"), 0.3) == []
    effects = m.handle(NodeSaid("d", Finished(1, "stop", 2, 0, 0, None)), 0.4)
    assert [type(e) for e in effects] == [EmitFinish, CloseStream, Done]


def test_a_lost_finish_at_the_limit_is_no_loss() -> None:
    m = machine(max_tokens=2)
    m.handle(routed(1), 0.0)
    m.handle(Tokens("p", entry(1, 0)), 0.1)
    m.handle(Tokens("d", entry(1, 1)), 0.2)
    effects = m.handle(LinkLost("d"), 0.3)
    assert isinstance(effects[0], EmitFinish)
    assert effects[0].reason == "length"
    assert isinstance(effects[-1], Done)


def test_a_broken_transfer_rules_out_the_pair_only() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    effects = m.handle(NodeSaid("p", Failed(1, "transfer_timeout", "", True)), 0.1)
    again = effects[-1]
    assert isinstance(again, Replan)
    assert again.broken.avoid_nodes == frozenset()
    assert again.broken.avoid_pairs == {Pair(NodeStart("p", ""), NodeStart("d", ""))}


@pytest.mark.parametrize(
    "event",
    [
        Tokens("p", entry(1, 2)),  # nobody else could say 0 and 1 ... but decode waits, see below
        NodeSaid("p", Finished(1, "stop", 3, 0, 0, None)),
        NodeSaid("p", Finished(1, "handoff", 2, 0, 0, REPORT)),
        NodeSaid("p", Finished(1, "cancelled", 0, 0, 0, None)),
        NodeSaid("d", Finished(1, "handoff", 1, 0, 0, None)),
    ],
)
def test_nonsense_from_a_node_fails_the_attempt(event: Event) -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    effects = m.handle(event, 0.1)
    if isinstance(event, Tokens):  # a gap shows when the prefill leg ends
        assert effects == []
        effects = m.handle(NodeSaid("p", Finished(1, "handoff", 0, 0, 0, REPORT)), 0.2)
    assert isinstance(effects[-1], Replan)
    assert m.record.attempts[0].outcome in ("protocol_error", "peer_failed")


def test_a_repeated_index_fails_the_attempt_and_is_not_relayed() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    m.handle(Tokens("p", entry(1, 0)), 0.1)
    effects = m.handle(Tokens("p", entry(1, 0)), 0.2)
    assert text_of(effects) == b""
    assert isinstance(effects[-1], Replan)


def test_waiting_entries_are_bounded() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    for i in range(MAX_WAITING_ENTRIES):
        assert m.handle(Tokens("d", StepEntry(1, 1 + i, [1], b"")), 0.1) == []
    over = StepEntry(1, 1 + MAX_WAITING_ENTRIES, [1], b"")
    assert isinstance(m.handle(Tokens("d", over), 0.1)[-1], Replan)


def test_attempts_are_bounded_and_the_last_error_is_told() -> None:
    m = machine()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        m.handle(routed(attempt), 0.0)
        effects = m.handle(NodeSaid("p", Refused(attempt, "overloaded", "full", True, 1500)), 0.1)
    error, done = effects[-2:]
    assert isinstance(error, EmitError)
    assert (error.error.code, error.error.retry_after_s) == ("overloaded", 1.5)
    assert done == Done()


def test_the_deadline_cancels_both_legs() -> None:
    m = machine()
    m.handle(routed(1), 0.0)
    assert m.handle(Tick(), 99.0) == []
    effects = m.handle(Tick(), 100.0)
    assert effects[:2] == [SendCancel("p", 1), SendCancel("d", 1)]
    assert [e.error.code for e in effects if isinstance(e, EmitError)] == ["deadline_exceeded"]
