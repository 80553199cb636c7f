"""Text by token index, and what a router keeps for clients that lost their connection."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api.event_id import EventId, TextProof, drawn_seed, parse_event_id, place_of
from router.api.render import Usage
from router.request import resume_book
from router.request.events import RequestSpec
from router.request.resume_book import KEEP_S, REPLAY_BYTES, Ended, Resumable, ResumeBook
from wire.errors import RequestError
from wire.messages import Accepted, Sampling, TextInput


def answer(name="r", tenant="t", prompt_bytes=10, first_index=0, max_tokens=50):
    sampling = Sampling(max_tokens, 0.0, 1.0, 1, [], False)
    spec = RequestSpec(name, "m", tenant, TextInput("x"), sampling, [], 5.0)
    return Resumable(spec, 1, prompt_bytes, first_index)


def answer_after(begin):
    one = answer()
    return Resumable(one.spec, 1, 10, 0, begin)


EVENTS = st.lists(st.tuples(st.integers(1, 4), st.binary(min_size=1, max_size=9)), max_size=40)


@given(events=EVENTS, first=st.integers(0, 5), trailing=st.integers(0, 3), data=st.data())
def test_whatever_an_id_leaves_unread_follows_it_once(events, first, trailing, data):
    one = answer(first_index=first)
    uptos = [first, *accumulate((count for count, _ in events), initial=first)][1:]
    for (_, text), upto in zip(events, uptos[1:], strict=True):
        one.add(text, upto)
    one.rest(range(uptos[-1] + trailing), None)
    whole = b"".join(text for _, text in events)
    place = data.draw(st.integers(0, len(events)))
    read = b"".join(text for _, text in events[:place])
    pieces = list(one.after(EventId("r", uptos[place])))
    assert read + b"".join(text for text, _ in pieces) == whole
    assert all(one.position(EventId("r", upto)) is not None for _, upto in pieces)
    assert [upto for _, upto in pieces] == sorted({upto for _, upto in pieces})
    for upto in range(uptos[-1] + trailing + 3):
        known = upto in uptos or uptos[-1] < upto <= uptos[-1] + trailing
        assert (one.position(EventId("r", upto)) is not None) == known
    assert list(one.after(EventId("r", uptos[-1] + trailing))) == []


@given(events=EVENTS, cut=st.integers(0, 400), known=st.binary(max_size=9))
def test_a_proof_finds_its_place_whatever_the_events_were(events, cut, known):
    begin = TextProof().after(known)
    one = answer_after(begin)
    for number, (_, text) in enumerate(events):
        one.add(text, number + 1)
    whole = b"".join(text for _, text in events)
    read = whole[:cut]
    event = EventId("r", 99, begin.after(read))
    assert one.position(event) == len(read)
    assert read + b"".join(text for text, _ in one.after(event)) == whole
    others = (
        begin.after(whole + b"x"),
        begin.after(read[:-1] + b"~~"),
        begin.after(read + b"\x00"),
    )
    for other in others:
        is_same = known + whole[: other.num_bytes - len(known)] == known + read + b"\x00"
        assert one.position(EventId("r", 1, other)) is None or is_same


def test_a_replay_comes_in_events_of_bounded_size():
    one = answer()
    for upto in range(1, 5001):
        one.add(b"x" * 100, upto)
    pieces = list(one.after(EventId("r", 0)))
    assert sum(len(text) for text, _ in pieces) == 500_000
    assert max(len(text) for text, _ in pieces) <= REPLAY_BYTES
    assert len(pieces) == 8
    one.add(b"y" * 2 * REPLAY_BYTES, 5001)
    assert [len(text) for text, _ in one.after(EventId("r", 5000))] == [2 * REPLAY_BYTES]


def test_the_next_attempt_starts_after_the_tokens_that_were_relayed():
    one = answer()
    one.rest([5, 6, 70_000], Accepted(9, 12, 4))
    spec = one.next_spec(99.0)
    assert (spec.relayed, spec.deadline, spec.request_id) == ((5, 6, 70_000), 99.0, "r")
    assert spec.accepted == Accepted(9, 12, 4)
    one.rest([5, 6, 70_000, 1], None)  # of an attempt whose Accepted never came
    assert one.next_spec(1.0).accepted == Accepted(9, 12, 4)


def test_an_answer_that_lost_only_its_finish_is_complete():
    one = answer(max_tokens=3)
    one.rest([1, 2], Accepted(9, 12, 4))
    one.finish_if_full()
    assert one.ended is None
    one.rest([1, 2, 3], None)
    one.finish_if_full()
    assert one.ended == Ended("length", Usage(12, 4, 3))


def test_records_last_half_a_minute_after_their_connection():
    book, one = ResumeBook(), answer()
    book.sending(one)
    assert book.get(one.key, 1e9) is one, "it is being sent, however long that takes"
    book.released(one, 100.0)
    assert book.get(one.key, 100.0 + KEEP_S - 0.001) is one
    assert book.get(one.key, 100.0 + KEEP_S) is None
    assert len(book) == 1
    book.trim(100.0 + KEEP_S)
    assert len(book) == 0


def test_a_key_is_tenant_and_id():
    book = ResumeBook()
    book.sending(answer("r", "t"))
    assert book.get(("u", "r"), 0.0) is None
    assert book.get(("t", "s"), 0.0) is None


def test_a_connection_that_was_taken_over_releases_nothing():
    book, old, new = ResumeBook(), answer(), answer()
    book.sending(old)
    book.sending(new)
    book.released(old, 5.0)
    assert book.get(new.key, 1e9) is new
    assert len(book) == 1


def test_the_oldest_leave_first_and_those_being_sent_last(monkeypatch):
    monkeypatch.setattr(resume_book, "MAX_RECORDS", 3)
    book = ResumeBook()
    answers = {name: answer(name) for name in "abcde"}
    for name in "abc":
        book.sending(answers[name])
    book.released(answers["b"], 0.0)
    book.sending(answers["d"])
    assert answers["b"].is_dropped
    book.sending(answers["e"])
    assert answers["a"].is_dropped
    kept = [name for name, one in answers.items() if book.get(one.key, 0.0) is one]
    assert kept == ["c", "d", "e"]
    book.released(answers["a"], 0.0)
    assert len(book) == 3, "what was dropped does not come back"


def test_bytes_are_bounded(monkeypatch):
    monkeypatch.setattr(resume_book, "MAX_BYTES", 10_000)
    book = ResumeBook()
    answers = [answer(str(number), prompt_bytes=1000) for number in range(5)]
    for one in answers:
        book.sending(one)
        one.add(b"x" * 992, 1)
    book.trim(0.0)
    assert book.num_bytes == 10_000
    answers[4].add(b"y", 2)
    book.trim(0.0)
    assert [one.is_dropped for one in answers] == [True, False, False, False, False]
    answers[0].add(b"more", 3)
    assert answers[0].num_bytes == 0
    assert answers[0].position(EventId("r", 0)) is None


REQUEST_ID = "chatcmpl-" + "0a" * 16
SEED_OF_REQUEST_ID = 0xEFC6_4EA0_2936_063C


def test_event_ids():
    assert parse_event_id(f" {REQUEST_ID}:17 ", "chat") == EventId(REQUEST_ID, 17)
    completion = REQUEST_ID.replace("chat", "", 1)
    assert parse_event_id(f"{completion}:0", "completion") == EventId(completion, 0)
    proof = TextProof().after(b"some").after(b" text")
    place = place_of(17, proof).decode()
    assert place == "17~9.4fbabdba"
    assert parse_event_id(f"{REQUEST_ID}:{place}", "chat") == EventId(REQUEST_ID, 17, proof)


def test_drawn_seeds_differ_and_stay_the_same():
    seeds = [drawn_seed(f"chatcmpl-{number:032x}") for number in range(100)]
    assert len(set(seeds)) == 100
    assert max(seeds) >= 2**63
    assert drawn_seed(REQUEST_ID) == SEED_OF_REQUEST_ID  # releases agree


@pytest.mark.parametrize(
    "header",
    [
        "17",
        REQUEST_ID,
        f"{REQUEST_ID}:",
        f"{REQUEST_ID}:-1",
        f"{REQUEST_ID}:1e3",
        f"{REQUEST_ID}:{10**9}",
        f"{REQUEST_ID}:1:2",
        f"{REQUEST_ID}:1~",
        f"{REQUEST_ID}:1~5",
        f"{REQUEST_ID}:1~5.abc",
        f"{REQUEST_ID}:1~5.ABCDEF01",
        f"{REQUEST_ID}:1~{10**10}.00000000",
        f"{REQUEST_ID[:-1]}:1",
        f"{REQUEST_ID}g:1",
        f"{REQUEST_ID}:١",
        f"cmpl-{'0a' * 16}:1",
        "\x00" * 100,
    ],
)
def test_other_event_ids_are_refused_with_advice(header):
    with pytest.raises(RequestError) as caught:
        parse_event_id(header, "chat")
    assert caught.value.param == "Last-Event-ID"
    assert caught.value.code == "invalid_value"
