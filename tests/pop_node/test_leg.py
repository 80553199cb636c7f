"""A leg tells the router one ending and lets go of engine and transfer once, whatever happens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leg_world import EOS, REPORT, FakeText, World, make_leg, prepared, said

from pop_node.engine import messages as engine
from pop_node.legs import events as ev
from wire.errors import PeerError, RequestError
from wire.messages import Accepted, Failed, Finished, Refused


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


@settings(max_examples=400)
@given(st.sampled_from(["both", "prefill", "decode"]), st.sampled_from([1, 2]), st.data())
def test_every_leg_ends_exactly_once(kind, version, data):
    world = World(kind, version)
    for _ in range(data.draw(st.integers(0, 16))):
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
    assert not world.waits
    assert version == 2 or not world.detached
    assert world.leg.handle(ev.Cancelled()) == []


@pytest.mark.parametrize("kind", ["both", "prefill", "decode"])
def test_ending_twice_is_silent(kind):
    leg = make_leg(kind)
    leg.handle(prepared())
    assert len(said(leg.handle(ev.Cancelled()))) == 1
    assert said(leg.handle(ev.Cancelled())) == []
    assert said(leg.handle(ev.Broken(PeerError("late")))) == []
