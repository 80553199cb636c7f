"""A leg tells the router one ending and lets go of engine and transfer once, whatever happens."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop_node import leg as legs
from pop_node import leg_events as ev
from pop_node.engine import messages as engine
from wire.errors import PeerError, RequestError, TransferError
from wire.messages import (
    Accepted,
    Failed,
    Finished,
    Refused,
    Sampling,
    Submit,
    TextInput,
    Transfer,
    TransferReport,
)

REPORT = TransferReport(100, 100, 50, 1.0, 2.0, 1.0, 0.5)
EOS = 2


@dataclass
class FakeText:
    """A fake detokeniser: token n reads "<n>"; the text "<7>" is a stop string."""

    seen: list[int] = field(default_factory=list)

    def push(self, ids):
        self.seen += ids
        text = "".join(f"<{i}>" for i in ids if i != 7)
        return FakeDelta(text, 7 in ids)

    def flush(self):
        return "!"


@dataclass
class FakeDelta:
    text: str
    stopped: bool


def make_leg(kind="both", forced=()):
    transfer = None if kind == "both" else Transfer(b"t" * 16, "peer", "127.0.0.1:1")
    submit = Submit(
        stream=5,
        request_id="r",
        attempt=1,
        leg=kind,
        model="m",
        tenant="",
        input=TextInput("hello"),
        sampling=Sampling(8, 0.0, 1.0, 1, [], False),
        forced_ids=list(forced),
        transfer=transfer,
        chain=[],
        deadline_remaining_ms=1000,
    )
    return legs.Leg(1, submit, frozenset({EOS}), lambda text: text.encode())


def said(effects):
    return [e.message for e in effects if isinstance(e, ev.Say)]


def prepared():
    return ev.Prepared([10, 11, 12], 8, FakeText())


def test_both_runs_to_its_end():
    leg = make_leg()
    (add,) = leg.handle(prepared())
    assert add.message.stop_ids == [EOS]
    assert said(leg.handle(engine.Allocated(1, 2))) == [Accepted(5, 3, 2)]
    leg.handle(engine.PrefillDone(1, 1.5, 9.0))
    (emit,) = leg.handle(engine.Token(1, 0, 40, ""))
    assert (emit.entry.index, emit.entry.ids, emit.entry.text) == (0, [40], b"<40>")
    effects = leg.handle(engine.Token(1, 1, EOS, "stop"))
    assert effects[0].entry.text == b"<2>!"
    assert said(effects) == [Finished(5, "stop", 2, 1.5, 9.0, None)]
    assert leg.handle(engine.Ended(1)) == [ev.Over()]


def test_a_stop_string_drops_the_sequence():
    leg = make_leg()
    leg.handle(prepared())
    leg.handle(engine.Allocated(1, 0))
    effects = leg.handle(engine.Token(1, 0, 7, ""))
    assert said(effects)[0].reason == "stop"
    assert ev.ToEngine(engine.Drop(1)) in effects
    assert leg.handle(engine.Token(1, 1, 8, "")) == []


@pytest.mark.parametrize("kind", ["both", "prefill", "decode"])
@pytest.mark.parametrize("forced", [[40, EOS], [40, 7]])
def test_an_answer_that_lost_only_its_finish_is_not_computed(kind, forced):
    leg = make_leg(kind, forced)
    effects = leg.handle(prepared())
    assert said(effects) == [Accepted(5, 3, 0), Finished(5, "stop", 2, 0.0, 0.0, None)]
    assert effects[-1] == ev.Over()
    assert not [e for e in effects if isinstance(e, ev.ToEngine | ev.OpenTransfer)]
    assert leg.answer().reason == "stop"
    assert leg.handle(ev.Cancelled()) == []


def test_prefill_hands_over():
    leg = make_leg("prefill")
    effects = leg.handle(prepared())
    assert effects[1] == ev.OpenTransfer([10, 11, 12])
    assert ev.ComputeStarted() in leg.handle(engine.Allocated(1, 0))
    assert ev.ComputeEnded() in leg.handle(engine.PrefillDone(1, 0.0, 5.0))
    effects = leg.handle(engine.Token(1, 0, 40, "handoff"))
    assert ev.CommitTransfer([40]) in effects
    assert said(effects) == []
    effects = leg.handle(ev.TransferDone(REPORT))
    assert said(effects)[0] == Finished(5, "handoff", 1, 0.0, 5.0, REPORT)
    assert ev.ToEngine(engine.Release(b"t" * 16)) in effects
    assert leg.handle(engine.Ended(1)) == [ev.Over()]


def test_prefill_that_finishes_cancels_its_transfer():
    leg = make_leg("prefill")
    leg.handle(prepared())
    leg.handle(engine.Allocated(1, 0))
    effects = leg.handle(engine.Token(1, 0, EOS, "stop"))
    assert said(effects)[0].reason == "stop"
    assert [e.code for e in effects if isinstance(e, ev.CancelTransfer)] == ["answer_complete"]


def test_decode_continues_after_the_commit():
    leg = make_leg("decode")
    text = FakeText()
    effects = leg.handle(ev.Prepared([10, 11], 8, text))
    assert effects[1] == ev.ExpectTransfer([10, 11])
    assert ev.GrantTransfer(4) in leg.handle(engine.Allocated(1, 4))
    effects = leg.handle(ev.TransferCommitted([40]))
    assert ev.ToEngine(engine.Commit(b"t" * 16, [40])) in effects
    assert text.seen == [40]
    (emit,) = leg.handle(engine.Token(1, 1, 41, ""))
    assert emit.entry.index == 1


def test_forced_ids_are_not_emitted_again():
    leg = make_leg(forced=[40, 41])
    text = FakeText()
    (add,) = leg.handle(ev.Prepared([10], 8, text))
    assert add.message.forced_ids == [40, 41]
    assert text.seen == [40, 41]
    leg.handle(engine.Allocated(1, 0))
    (emit,) = leg.handle(engine.Token(1, 2, 42, ""))
    assert emit.entry.index == 2


def test_a_commit_carries_what_follows_the_forced_ids():
    prefill, decode = make_leg("prefill", forced=[40, 41]), make_leg("decode", forced=[40, 41])
    assert prefill.handle(prepared())[1] == ev.OpenTransfer([10, 11, 12, 40, 41])
    assert decode.handle(prepared())[1] == ev.ExpectTransfer([10, 11, 12, 40, 41])
    prefill.handle(engine.Allocated(1, 0))
    decode.handle(engine.Allocated(1, 0))
    assert ev.CommitTransfer([42]) in prefill.handle(engine.Token(1, 2, 42, "handoff"))
    effects = decode.handle(ev.TransferCommitted([42]))
    assert ev.ToEngine(engine.Commit(b"t" * 16, [40, 41, 42])) in effects
    (emit,) = decode.handle(engine.Token(1, 3, 43, ""))
    assert emit.entry.index == 3


def test_cancel_while_the_tokeniser_runs_waits_for_it():
    leg = make_leg()
    assert said(leg.handle(ev.Cancelled()))[0].reason == "cancelled"
    assert leg.state == "closing"
    assert leg.handle(prepared()) == [ev.Over()]


def test_a_bad_prompt_is_refused():
    leg = make_leg()
    effects = leg.handle(ev.PrepareFailed(RequestError("too long", code="context_length_exceeded")))
    assert said(effects) == [Refused(5, "context_length_exceeded", "too long", False, 0)]
    assert effects[-1] == ev.Over()


def test_a_dead_engine_ends_the_leg_at_once():
    leg = make_leg("decode")
    leg.handle(prepared())
    error = PeerError("engine died", code="engine_died")
    effects = leg.handle(ev.Broken(error, engine_gone=True))
    assert said(effects) == [Failed(5, "engine_died", "engine died", True)]
    assert effects[-1] == ev.Over()


class World:
    """A fake engine and KV stream that answer a leg's effects when the test lets them."""

    def __init__(self, kind: str) -> None:
        self.leg = make_leg(kind)
        self.kind = kind
        self.in_engine = self.over = False
        self.transfer = "none"
        self.endings: list[object] = []
        self.index = 0
        self.tokenising = True
        self.finished_by_engine = False

    def feed(self, event) -> None:
        for effect in self.leg.handle(event):
            assert not self.over, "an effect after Over"
            match effect:
                case ev.ToEngine(engine.Add()):
                    assert not self.in_engine
                    self.in_engine = True
                case ev.ToEngine(engine.Drop() | engine.Release()):
                    assert self.in_engine
                    self.finished_by_engine = True
                case ev.OpenTransfer() | ev.ExpectTransfer():
                    assert self.transfer == "none"
                    self.transfer = "open"
                case ev.CancelTransfer():
                    assert self.transfer == "open"
                    self.transfer = "closed"
                case ev.Say(Refused() | Finished() | Failed() as message):
                    self.endings.append(message)
                case ev.Over():
                    self.over = True

    def choices(self):
        out = []
        if self.tokenising:
            out += [prepared(), ev.PrepareFailed(RequestError("bad"))]
        if self.in_engine:
            out += [engine.Allocated(1, 0), engine.PrefillDone(1, 0.0, 1.0)]
            if self.leg.state == "running" and self.index < 6:
                can_hand_over = self.kind == "prefill" and self.transfer == "open"
                finishes = ["handoff", "stop"] if can_hand_over else ["", "stop"]
                if self.kind != "decode" or self.transfer == "closed":
                    out += [engine.Token(1, self.index, 40 + self.index, f) for f in finishes]
            if self.leg.state == "queued":
                out.append(engine.Declined(1, "overloaded", "full"))
            if self.finished_by_engine:
                out.append(engine.Ended(1))
        if self.transfer == "open":
            out.append(ev.TransferFailed(TransferError("lost")))
            if self.kind == "prefill" and self.leg.state == "handoff":
                out.append(ev.TransferDone(REPORT))
            if self.kind == "decode" and self.leg.state == "running":
                out.append(ev.TransferCommitted([40]))
        out.append(ev.Cancelled())
        out.append(ev.Broken(PeerError("deadline"), engine_gone=False))
        return out

    def step(self, event) -> None:
        match event:
            case ev.Prepared() | ev.PrepareFailed():
                self.tokenising = False
            case engine.Token():
                self.index += 1
                self.finished_by_engine |= event.finish == "stop"
            case engine.Declined() | engine.Ended():
                self.in_engine = False
            case ev.TransferFailed() | ev.TransferDone():
                self.transfer = "closed"
            case ev.TransferCommitted():
                self.transfer = "closed"
                self.index = 1
        self.feed(event)


@settings(max_examples=300)
@given(st.sampled_from(["both", "prefill", "decode"]), st.data())
def test_every_leg_ends_exactly_once(kind, data):
    world = World(kind)
    for _ in range(data.draw(st.integers(0, 12))):
        if world.over:
            break
        choices = world.choices()
        world.step(choices[data.draw(st.integers(0, len(choices) - 1))])
    # Let everything that is still under way come to rest.
    if not world.over:
        world.step(ev.Cancelled())
    if world.tokenising and not world.over:
        world.step(prepared())
    if world.in_engine and not world.over:
        world.step(engine.Ended(1))
    assert world.over
    assert len(world.endings) == 1
    assert world.transfer in ("none", "closed")
    assert world.leg.handle(ev.Cancelled()) == []


@pytest.mark.parametrize("kind", ["both", "prefill", "decode"])
def test_ending_twice_is_silent(kind):
    leg = make_leg(kind)
    leg.handle(prepared())
    assert len(said(leg.handle(ev.Cancelled()))) == 1
    assert said(leg.handle(ev.Cancelled())) == []
    assert said(leg.handle(ev.Broken(PeerError("late")))) == []
