"""What the scheduler promises of batches, blocks and the queue, one promise per test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_builders import an_add
from stepped_engine import Engine, expected, receive

from pop_node.engine.messages import Allocated, Ended, Release
from tests.fakes.fake_model import VOCABULARY, answer


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
