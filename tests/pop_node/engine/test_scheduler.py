"""What the scheduler promises, one promise per test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_builders import a_scheduler, an_add

from pop_node.engine.messages import (
    Add,
    Allocated,
    Commit,
    Declined,
    Drop,
    Ended,
    Release,
    Retarget,
    Token,
)
from pop_node.engine.schedule import (
    Effect,
    TransferBound,
    TransferClosed,
    TransferRenamed,
    TransferUnbound,
)
from tests.fakes.fake_model import VOCABULARY, FakeModel, answer


class Engine:
    """A scheduler and a fake model, stepped by hand; ``effects`` collects everything said."""

    def __init__(self, num_blocks: int = 64, block_tokens: int = 4, **limits: Any) -> None:
        self.scheduler, self.pool = a_scheduler(num_blocks, block_tokens, **limits)
        self.model = FakeModel(num_blocks, block_tokens)
        self.effects: list[Effect] = []

    def tell(self, command: Add | Drop | Retarget | Release | Commit) -> list[Effect]:
        got = self.scheduler.handle(command, 0.0)
        self.effects += got
        self.scheduler.check()
        return got

    def step(self) -> dict[int, int]:
        """One step; returns how many tokens were computed per sequence."""
        schedule, effects = self.scheduler.schedule(0.0)
        self.effects += effects
        self.effects += self.scheduler.complete(schedule, self.model.run(schedule), 0.0)
        self.scheduler.check()
        return {row.sequence.seq: row.count for row in schedule.rows}

    def finish(self, max_steps: int = 500) -> None:
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError("the engine does not come to rest")

    def tokens(self, seq: int) -> list[tuple[int, int, str]]:
        mine = [e for e in self.effects if isinstance(e, Token) and e.seq == seq]
        return [(e.index, e.id, e.finish) for e in mine]

    def said(self, kind: type) -> list[Any]:
        return [e for e in self.effects if isinstance(e, kind)]


def expected(
    prompt: list[int], count: int, last: str, first: int = 0
) -> list[tuple[int, int, str]]:
    text = answer(prompt, count)
    finishes = [""] * (count - 1) + [last]
    return [(first + i, text[i], finishes[i]) for i in range(count)]


def test_one_sequence_from_add_to_end() -> None:
    engine = Engine()
    engine.tell(an_add(1))
    engine.finish()
    assert engine.tokens(1) == expected(list(range(10)), 5, "length")
    assert engine.said(Allocated) == [Allocated(1, 0)]
    assert engine.effects[-1] == Ended(1)
    assert engine.pool.available == 64


def test_decode_rows_come_before_prefill_chunks_and_the_budget_holds() -> None:
    engine = Engine(token_budget=8)
    engine.tell(an_add(1, prompt_ids=[1, 2, 3], max_tokens=6))
    assert engine.step() == {1: 3}
    engine.tell(an_add(2, prompt_ids=[4] * 20))
    assert engine.step() == {1: 1, 2: 7}
    assert engine.step() == {1: 1, 2: 7}
    assert engine.step() == {1: 1, 2: 6}
    engine.finish()
    assert engine.tokens(2) == expected([4] * 20, 5, "length")


def test_prefill_budget_goes_to_the_oldest_first() -> None:
    engine = Engine(token_budget=8)
    engine.tell(an_add(1, prompt_ids=[1] * 12))
    engine.tell(an_add(2, prompt_ids=[2] * 12))
    assert engine.step() == {1: 8}
    assert engine.step() == {1: 4, 2: 4}


def test_a_stop_id_ends_the_answer_and_is_told() -> None:
    engine = Engine()
    text = answer(list(range(10)), 5)
    engine.tell(an_add(1, stop_ids=[text[2]], max_tokens=5))
    engine.finish()
    assert engine.tokens(1)[-1] == (text.index(text[2]), text[2], "stop")
    assert engine.effects[-1] == Ended(1)


def test_forced_ids_are_computed_but_not_told_again() -> None:
    engine = Engine()
    prompt = list(range(10))
    forced = [3, 1, 4]
    engine.tell(an_add(1, forced_ids=forced, max_tokens=6))
    engine.finish()
    assert engine.tokens(1) == expected(prompt + forced, 3, "length", first=3)


def test_a_known_beginning_is_reused_but_the_last_token_is_computed() -> None:
    engine = Engine()
    prompt = [1] * 16
    engine.tell(an_add(1, prompt_ids=prompt))
    engine.finish()
    engine.tell(an_add(2, prompt_ids=prompt))
    assert engine.step() == {2: 4}
    assert engine.said(Allocated)[-1] == Allocated(2, 12)
    engine.finish()
    assert engine.tokens(2) == engine.tokens(1)


def test_tenants_do_not_share_beginnings() -> None:
    engine = Engine()
    engine.tell(an_add(1))
    engine.finish()
    engine.tell(an_add(2, salt=b"another"))
    engine.finish()
    assert engine.said(Allocated)[-1] == Allocated(2, 0)


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


def receive(engine: Engine, add: Add) -> TransferBound:
    engine.tell(add)
    engine.step()
    bound = engine.said(TransferBound)[-1]
    assert bound.transfer == add.transfer
    return bound


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


def test_the_youngest_gives_way_and_its_text_stays_right() -> None:
    engine = Engine(num_blocks=8, token_budget=64)
    for seq in (1, 2, 3):
        engine.tell(an_add(seq, prompt_ids=[seq] * 6, max_tokens=14))
    preemptions = 0
    while engine.step():
        all_were_admitted = len(engine.said(Allocated)) == 3
        preemptions += all_were_admitted and engine.scheduler.load().waiting > 0
    assert preemptions > 0
    for seq in (1, 2, 3):
        assert engine.tokens(seq) == expected([seq] * 6, 14, "length")
    assert len(engine.said(Allocated)) == 3
    assert [e.seq for e in engine.said(Ended)] == [1, 2, 3]


def test_a_large_sequence_at_the_head_is_not_overtaken_by_small_ones() -> None:
    engine = Engine(num_blocks=10, token_budget=64)
    engine.tell(an_add(1, prompt_ids=[1] * 20, max_tokens=8))
    engine.step()
    engine.tell(an_add(2, prompt_ids=[2] * 36, max_tokens=2))
    seq = 3
    while not any(e.seq == 2 for e in engine.said(Allocated)):
        engine.tell(an_add(seq, leg="decode", prompt_ids=[seq] * 2, max_tokens=3))
        seq += 1
        engine.step()
        assert seq < 15, "the large sequence starves"
    assert [e.seq for e in engine.said(Allocated)] == [1, 2]


def test_a_decode_leg_passes_prefills_that_wait_only_for_budget() -> None:
    engine = Engine(token_budget=8)
    engine.tell(an_add(1, prompt_ids=[1] * 30))
    engine.tell(an_add(2, prompt_ids=[2] * 30))
    engine.tell(an_add(3, leg="decode"))
    engine.step()
    assert [e.seq for e in engine.said(Allocated)] == [1, 3]


def test_a_decode_leg_leaves_the_blocks_of_older_prefills_alone() -> None:
    engine = Engine(num_blocks=16, token_budget=8)
    engine.tell(an_add(1, prompt_ids=[1] * 10))
    engine.tell(an_add(2, prompt_ids=[2] * 34))
    engine.tell(an_add(3, leg="decode", prompt_ids=[3] * 20))
    engine.step()
    assert [e.seq for e in engine.said(Allocated)] == [1]


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


def test_blocks_that_wait_for_kv_or_release_are_used_at_admission() -> None:
    engine = Engine(num_blocks=6)
    engine.tell(an_add(1, leg="prefill", prompt_ids=[1] * 8))
    engine.finish()
    receive(engine, an_add(2, leg="decode", prompt_ids=[2] * 12))
    engine.tell(an_add(3, prompt_ids=[3] * 8, max_tokens=2))
    assert engine.step() == {}
    engine.tell(Release((1).to_bytes(16, "little")))
    assert engine.step() == {3: 8}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"prompt_ids": []}, "empty_prompt"),
        ({"prompt_ids": [VOCABULARY]}, "invalid_request"),
        ({"prompt_ids": [-1]}, "invalid_request"),
        ({"prompt_ids": [2**40]}, "invalid_request"),
        ({"forced_ids": [VOCABULARY]}, "invalid_request"),
        ({"forced_ids": [1, 2], "max_tokens": 2}, "invalid_request"),
        ({"max_tokens": 0}, "invalid_request"),
        ({"temperature": float("nan")}, "invalid_request"),
        ({"temperature": -0.1}, "invalid_request"),
        ({"top_p": 0.0}, "invalid_request"),
        ({"top_p": float("nan")}, "invalid_request"),
        ({"seed": 2**64}, "invalid_request"),
        ({"leg": "prefill", "transfer": b"short"}, "invalid_request"),
        ({"leg": "sideways"}, "invalid_request"),
        ({"max_tokens": 10_000}, "context_length_exceeded"),
        ({"max_tokens": 300}, "out_of_blocks"),
    ],
)
def test_an_impossible_add_is_declined(changes: dict[str, Any], code: str) -> None:
    engine = Engine()
    (declined,) = engine.tell(an_add(1, **changes))
    assert (declined.seq, declined.code) == (1, code)
    assert engine.scheduler.num_sequences == 0


def test_the_queue_is_bounded() -> None:
    engine = Engine(max_waiting=2)
    for seq in (1, 2):
        assert engine.tell(an_add(seq)) == []
    (declined,) = engine.tell(an_add(3))
    assert (declined.seq, declined.code) == (3, "overloaded")


def test_a_number_or_transfer_in_use_is_declined() -> None:
    engine = Engine()
    first = an_add(1, leg="prefill")
    engine.tell(first)
    assert engine.tell(an_add(1))[0].code == "invalid_request"
    assert engine.tell(replace(first, seq=2))[0].code == "invalid_request"
    engine.finish()
    assert engine.tokens(1)[0][2] == "handoff"


def test_load_counts_what_is_left_to_compute() -> None:
    engine = Engine(token_budget=8)
    engine.tell(an_add(1, prompt_ids=[1] * 12))
    engine.tell(an_add(2, prompt_ids=[2] * 12))
    engine.tell(an_add(3, leg="decode"))
    assert engine.scheduler.load().queued_prefill_tokens == 24
    engine.step()
    load = engine.scheduler.load()
    assert (load.queued_prefill_tokens, load.running, load.waiting, load.pinned) == (16, 1, 1, 1)


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
