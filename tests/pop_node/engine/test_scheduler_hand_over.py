"""What the scheduler promises prefill and decode legs that hand a sequence over."""

from __future__ import annotations

import pytest
from engine_builders import an_add
from stepped_engine import Engine, expected, receive

from pop_node.engine.messages import (
    Allocated,
    Commit,
    Declined,
    Drop,
    Ended,
    Release,
    Retarget,
)
from pop_node.engine.scheduling.schedule import (
    TransferBound,
    TransferClosed,
    TransferRenamed,
    TransferUnbound,
)
from tests.fakes.fake_model import VOCABULARY, answer


def test_a_prefill_leg_hands_off_after_one_token_and_keeps_its_blocks() -> None:
    engine = Engine()
    engine.tell(an_add(1, leg="prefill", forced_ids=[9], max_tokens=5))
    engine.finish()
    assert engine.tokens(1) == expected([*range(10), 9], 1, "handoff", first=1)
    assert engine.pool.available == 64 - 3
    assert engine.scheduler.load().pinned == 1
    ended = engine.tell(Release((1).to_bytes(16, "little")))
    assert ended == [TransferClosed("export", (1).to_bytes(16, "little")), Ended(1)]
    assert engine.pool.available == 64
    assert engine.tell(Release((1).to_bytes(16, "little"))) == []


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_prefill_leg_that_finishes_the_answer_lets_go_at_once(finish: str) -> None:
    engine = Engine()
    first = answer(list(range(10)), 1)[0]
    changes = {"stop_ids": [first]} if finish == "stop" else {"max_tokens": 1}
    engine.tell(an_add(1, leg="prefill", **changes))
    engine.finish()
    assert engine.tokens(1) == [(0, first, finish)]
    assert engine.effects[-1] == Ended(1)
    assert engine.pool.available == 64


def test_a_decode_leg_waits_for_its_kv_and_continues() -> None:
    engine = Engine()
    prompt = list(range(10))
    text = answer(prompt, 5)
    bound = receive(engine, an_add(1, leg="decode"))
    assert engine.said(Allocated) == [Allocated(1, 0)]
    assert engine.step() == {}
    engine.model.write(bound.blocks, prompt, 0, 10)
    engine.tell(Commit(bound.transfer, text[:1]))
    assert engine.step() == {1: 1}
    engine.finish()
    assert engine.tokens(1) == expected([*prompt, text[0]], 4, "length", first=1)
    assert engine.pool.available == 64


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_blocks_are_bound_before_anybody_hears_of_them(leg: str) -> None:
    """Pieces may arrive beside the main loop as soon as the agent was told; without blocks to land
    in they would be dropped, and their places stay empty."""
    engine = Engine()
    engine.tell(an_add(1, leg=leg, transfer=b"t" * 16, prompt_ids=list(range(9))))
    engine.step()
    told = [type(e) for e in engine.effects if isinstance(e, TransferBound | Allocated)]
    assert told == [TransferBound, Allocated]


def test_a_decode_leg_may_hit_its_whole_prompt() -> None:
    engine = Engine()
    prompt = [1] * 16
    engine.tell(an_add(1, prompt_ids=prompt))
    engine.finish()
    bound = receive(engine, an_add(2, leg="decode", prompt_ids=prompt))
    assert (bound.held_tokens, bound.total_tokens) == (16, 16)
    first = answer(prompt, 1)
    engine.tell(Commit(bound.transfer, first))
    engine.finish()
    assert engine.tokens(2) == expected(prompt + first, 4, "length", first=1)


def test_a_late_hand_off_leaves_a_few_tokens_to_compute() -> None:
    engine = Engine()
    prompt = list(range(10))
    text = answer(prompt, 9)
    bound = receive(engine, an_add(1, leg="decode", max_tokens=9))
    engine.model.write(bound.blocks, prompt, 0, 10)
    engine.tell(Commit(bound.transfer, text[:6]))
    engine.finish()
    assert [t[:2] for t in engine.tokens(1)] == [(i, text[i]) for i in range(6, 9)]


@pytest.mark.parametrize("ids", [[], [1, 2, 3, 4, 5], [VOCABULARY], [-1]])
def test_a_commit_that_cannot_be_continued_ends_the_sequence(ids: list[int]) -> None:
    engine = Engine()
    bound = receive(engine, an_add(1, leg="decode"))
    got = engine.tell(Commit(bound.transfer, ids))
    assert got[0] == TransferClosed("import", bound.transfer)
    assert isinstance(got[1], Declined)
    assert engine.pool.free == 64


def test_a_prefill_leg_that_gives_way_is_unbound_and_bound_again() -> None:
    engine = Engine(num_blocks=9, token_budget=3, max_sequences=2)
    engine.tell(an_add(1, prompt_ids=[1, 1, 1, 1], max_tokens=20))
    engine.step()
    engine.step()
    engine.tell(an_add(2, leg="prefill", prompt_ids=[2] * 24))
    kinds = (TransferBound, TransferUnbound, TransferClosed)
    for _ in range(40):
        engine.step()
    told = [type(e) for e in engine.effects if isinstance(e, kinds)]
    assert told == [TransferBound, TransferUnbound, TransferBound]
    assert engine.tokens(1) == expected([1, 1, 1, 1], 20, "length")
    assert engine.tokens(2) == expected([2] * 24, 1, "handoff")


@pytest.mark.parametrize("phase", ["waiting", "running", "preempted", "pinned"])
def test_a_prefill_leg_is_retargeted_in_any_phase(phase: str) -> None:
    engine = Engine(num_blocks=9, token_budget=3, max_sequences=2)
    prompt = [2] * 24
    if phase == "waiting":  # for seats
        engine.tell(an_add(8))
        engine.tell(an_add(9))
        engine.step()
    if phase == "preempted":
        engine.tell(an_add(8, prompt_ids=[1, 1, 1, 1], max_tokens=20))
        engine.step()
        engine.step()
    leg = an_add(1, leg="prefill", prompt_ids=prompt)
    engine.tell(leg)
    if phase == "running":
        engine.step()
    if phase == "preempted":
        for _ in range(40):
            if not engine.said(TransferUnbound):
                engine.step()
        assert engine.said(TransferUnbound)
    if phase == "pinned":
        engine.finish()
    old, new = leg.transfer, b"n" * 16
    assert engine.tell(Retarget(old, new)) == [TransferRenamed(old, new)]
    assert engine.tell(Retarget(old, b"x" * 16)) == []  # gone under that name
    assert engine.tell(Release(old)) == []
    before = len(engine.said(TransferBound))
    engine.finish()
    assert engine.tokens(1) == expected(prompt, 1, "handoff")
    assert all(bound.transfer == new for bound in engine.said(TransferBound)[before:])
    assert engine.tell(Release(new)) == [TransferClosed("export", new), Ended(1)]
    engine.finish()
    assert engine.scheduler.num_sequences == 0


def test_a_transfer_is_not_renamed_to_one_in_use() -> None:
    engine = Engine()
    first, second = an_add(1, leg="prefill"), an_add(2, leg="prefill")
    engine.tell(first)
    engine.tell(second)
    assert engine.tell(Retarget(first.transfer, second.transfer)) == []
    engine.finish()
    assert engine.tell(Release(first.transfer))[-1] == Ended(1)


@pytest.mark.parametrize(("kept", "cached"), [(0, 0), (3, 0), (4, 4), (11, 8), (14, 12), (99, 12)])
def test_full_blocks_of_a_broken_hand_over_stay_cached(kept: int, cached: int) -> None:
    """Of 14 tokens in blocks of 4, the last two fill no block."""
    engine = Engine()
    prompt, forced = list(range(12)), [5, 6]
    leg = an_add(1, leg="decode", prompt_ids=prompt, forced_ids=forced)
    bound = receive(engine, leg)
    engine.model.write(bound.blocks, prompt + forced, 0, 14)
    engine.tell(Drop(1, kept))
    assert engine.pool.cached * 4 == cached
    engine.tell(an_add(2, prompt_ids=prompt + forced + [7], max_tokens=3))
    engine.finish()
    assert engine.said(Allocated)[-1] == Allocated(2, cached)
    assert engine.tokens(2) == expected([*prompt, *forced, 7], 3, "length")


def test_a_kept_beginning_says_nothing_about_a_leg_that_computes() -> None:
    engine = Engine(token_budget=4)
    engine.tell(an_add(1))
    engine.step()
    engine.tell(Drop(1, 8))
    assert engine.pool.cached == 1
