"""The request machine against simulated nodes: exactly once, in order, one end, no leftovers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.avoidance import NodeStart, Pair
from router.patience import MAX_ATTEMPTS
from router.policy import Route
from router.record import RequestRecord
from router.request_events import (
    ClientGone,
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
    Unroutable,
)
from router.request_machine import SETTLE_S, RequestMachine
from router.token_relay import MAX_WAITING_ENTRIES
from tests.fakes.fake_node import answer_ids
from wire.errors import OverloadError
from wire.messages import (
    Accepted,
    Failed,
    Finished,
    Refused,
    Sampling,
    StepEntry,
    Submit,
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


# ---- random runs -------------------------------------------------------------------------------


@dataclass
class _Leg:
    """A simulated leg: it says its messages in order, each at a random moment."""

    node: str
    submit: Submit
    said: list[Event] = field(default_factory=list)
    cancelled: bool = False


class Simulation:
    """Random nodes around one machine; checks every effect as it comes."""

    def __init__(self, seed: int, answer: int, trouble: float, leave: float) -> None:
        self.rng = random.Random(seed)
        self.answer = answer
        self.trouble, self.leave = trouble, leave
        self.machine = machine(max_tokens=self.rng.choice([None, answer]))
        self.now = 0.0
        self.stream = 0
        self.legs: list[_Leg] = []
        self.commits: dict[int, int] = {}
        self.text = b""
        self.headers = 0
        self.ends = 0
        self.done = 0
        self.gone = False

    def feed(self, event: Event) -> None:
        queue = [event]
        while queue:
            for effect in self.machine.handle(queue.pop(0), self.now):
                self.check(effect, queue)

    def check(self, effect: Effect, queue: list[Event]) -> None:
        assert not self.done, f"{effect} after Done"
        match effect:
            case SendSubmit(node, message):
                assert not self.ends
                self.submitted(node, message)
            case SendCancel(node, stream):
                for leg in self.legs:
                    if leg.node == node and leg.submit.stream == stream:
                        leg.cancelled = True
            case CloseStream():
                pass
            case Replan():
                assert not self.ends
                if self.rng.random() < 0.1:
                    queue.append(Unroutable(OverloadError("none", code="no_route")))
                else:
                    queue.append(self.route())
            case EmitHeaders():
                self.headers += 1
                assert self.headers == 1
                assert not self.ends
            case EmitText(text, _):
                assert self.headers
                assert not self.ends
                self.text += text
            case EmitFinish(_, usage):
                assert self.headers
                self.ends += 1
                assert usage.completion_tokens == self.answer
                assert self.text == wanted(self.answer)
            case EmitError():
                self.ends += 1
            case Done():
                self.done += 1
        assert wanted(len(ANSWER)).startswith(self.text)

    def route(self) -> Routed:
        self.stream += 1
        pair = self.rng.choice([("a", "b"), ("a", "a"), ("c", "d")])
        return routed(self.stream, *pair)

    def submitted(self, node: str, submit: Submit) -> None:
        """Script what this leg will say."""
        leg, stream, rng = _Leg(node, submit), submit.stream, self.rng
        start = len(submit.forced_ids)
        assert submit.forced_ids == ANSWER[:start]
        assert wanted(start) == self.text  # forced is exactly what the client has
        if rng.random() < self.trouble / 3:
            leg.said = [NodeSaid(node, Refused(stream, "overloaded", "", True, 0))]
            self.legs.append(leg)
            return
        if submit.leg == "prefill":
            hand = min(self.answer, start + rng.randint(1, 2))
            self.commits[stream] = hand
            first, last = start, hand
        elif submit.leg == "decode":
            first, last = self.commits.get(stream, self.answer), self.answer
        else:
            first, last = start, self.answer
        leg.said.append(NodeSaid(node, Accepted(stream, 9, 0)))
        at = first
        while at < last:
            count = rng.randint(1, last - at)
            leg.said.append(Tokens(node, entry(stream, at, count)))
            at += count
        if submit.leg == "decode" and first >= self.answer:
            leg.said = [NodeSaid(node, Failed(stream, "answer_complete", "", True))]
        elif submit.leg == "prefill" and last < self.answer:
            leg.said.append(NodeSaid(node, Finished(stream, "handoff", last, 0, 0, REPORT)))
        else:
            leg.said.append(NodeSaid(node, Finished(stream, "stop", last, 0, 0, None)))
        if rng.random() < self.trouble:
            leg.said = leg.said[: rng.randrange(len(leg.said))]
            leg.said.append(
                rng.choice(
                    [
                        LinkLost(node),
                        NodeSaid(node, Failed(stream, "engine_died", "", True)),
                        NodeSaid(node, Failed(stream, "transfer_failed", "", True)),
                    ]
                )
            )
        self.legs.append(leg)

    def run(self) -> None:
        self.feed(self.route())
        while not self.done:
            self.now += 0.001
            talking = [leg for leg in self.legs if leg.said]
            if talking:
                self.feed(self.rng.choice(talking).said.pop(0))
            else:
                self.now = max(self.now, self.machine.next_deadline())
            self.feed(Tick())
            if self.rng.random() < self.leave and not self.gone:
                self.gone = True
                self.feed(ClientGone())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    answer=st.integers(1, len(ANSWER)),
    trouble=st.sampled_from([0.0, 0.3, 0.8]),
    leave=st.sampled_from([0.0, 0.05]),
)
def test_every_run_ends_once_and_relays_each_index_once(
    seed: int, answer: int, trouble: float, leave: float
) -> None:
    run = Simulation(seed, answer, trouble, leave)
    run.run()
    assert run.done == 1
    assert run.ends == 1 or run.gone
    if trouble == 0.0 and not run.gone:
        assert run.text == wanted(answer)
    final = run.machine.record.attempts[-1]
    assert final.outcome != "running"
