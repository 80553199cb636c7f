"""Answers that another router, or another connection, takes over: the book, and whole nodes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop_node.answers import answers
from pop_node.answers.answers import KEEP_S, Answer, AnswerBook, fullest, text_after
from pop_node.store.store import Store
from pop_node.text.stream import TextStream, escape_json
from pop_node.text.tokenizer import TextCodec
from tests.pop_node.hand_router import HandRouter, a_submit
from tests.pop_node.node_mesh import tiny_mesh, write_store
from wire.messages import Attach, Attached, Failed, Finished, Refused, Step, TextInput


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("tiny-store"))


@pytest.fixture(scope="session")
def codec(tiny_store: Store) -> TextCodec:
    return TextCodec.load(tiny_store.get("tiny-llama").path)


def answer(name: str = "r", num_ids: int = 1, reason: str = "", **changes: object) -> Answer:
    submit = a_submit(1, "both", request_id=name, **changes)
    return Answer(submit, list(range(num_ids)), 5, 0, reason)


# ---- the book ----------------------------------------------------------------------------------


def test_an_answer_is_kept_for_half_a_minute() -> None:
    book, one = AnswerBook(), answer()
    book.add(one, 10.0)
    assert book.next_deadline() == 10.0 + KEEP_S
    assert book.get("", "r", 10.0 + KEEP_S - 0.001) is one
    assert book.get("", "r", 10.0 + KEEP_S) is None
    book.expire(10.0 + KEEP_S - 0.001)
    assert len(book) == 1
    book.expire(10.0 + KEEP_S)
    assert (len(book), book.num_bytes, book.next_deadline()) == (0, 0, None)


def test_another_tenant_does_not_find_it() -> None:
    book = AnswerBook()
    book.add(answer(tenant="ann"), 0.0)
    assert book.get("bob", "r", 0.0) is None
    assert book.get("", "r", 0.0) is None
    assert book.get("ann", "r", 0.0) is not None


def test_the_fullest_leg_of_a_request_is_kept() -> None:
    book = AnswerBook()
    short, long, complete = answer(num_ids=1), answer(num_ids=7), answer(num_ids=7, reason="stop")
    for one, kept in ((short, short), (long, long), (short, long), (complete, complete)):
        book.add(one, 0.0)
        assert book.get("", "r", 0.0) is kept
    book.add(long, 1.0)
    assert book.get("", "r", 1.0) is complete
    assert len(book) == 1
    assert book.num_bytes == complete.num_bytes
    assert fullest([]) is None


def test_a_new_leg_counts_when_the_old_one_has_expired() -> None:
    book, new = AnswerBook(), answer(num_ids=1)
    book.add(answer(num_ids=7), 0.0)
    book.add(new, KEEP_S)
    assert book.get("", "r", KEEP_S) is new
    assert len(book) == 1


def test_the_book_is_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_ANSWERS", 3)
    book = AnswerBook()
    for number in range(5):
        book.add(answer(str(number)), float(number))
    assert [n for n in range(5) if book.get("", str(n), 5.0)] == [2, 3, 4]

    monkeypatch.setattr(answers, "MAX_BYTES", 10_000)
    big = answer("big", input=TextInput("x" * 9_000))
    book.add(big, 6.0)
    assert book.get("", "big", 6.0) is big
    assert book.num_bytes <= 10_000
    book.add(answer("huge", input=TextInput("x" * 11_000)), 7.0)
    assert (len(book), book.num_bytes) == (0, 0)


@given(
    ids=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    place=st.integers(0, 40),
    stop=st.lists(st.text("ab!#", min_size=1, max_size=3), max_size=2),
    reason=st.sampled_from(["", "stop", "length"]),
)
@settings(deadline=None)
def test_text_goes_on_where_events_had_come_to(
    codec: TextCodec, ids: list[int], place: int, stop: list[str], reason: str
) -> None:
    """Whatever a stream of single tokens had shown before an index, the rest follows it."""
    place = min(place, len(ids))
    one = Answer(a_submit(1, "both", stop=stop), ids, 1, 0, reason)
    stream, shown, whole = TextStream(codec, stop), "", ""
    for index, token in enumerate(ids):
        if index == place:
            shown = whole
        whole += stream.push([token]).text
    if place == len(ids):
        shown = whole
    whole += stream.flush() if reason else ""
    assert escape_json(shown) + text_after(codec, one, place) == escape_json(whole)


# ---- whole nodes -------------------------------------------------------------------------------


async def attach(router: HandRouter, number: int, name: str, upto: int = 0) -> Attached | Refused:
    """Ask for an answer over a link; what the node says to that."""
    router.send(Attach(number, name, "", upto))

    def told() -> Attached | Refused | None:
        for message in router.said:
            if isinstance(message, Attached | Refused) and message.stream == number:
                return message
        return None

    message: Attached | Refused = await router.until(told)
    return message


def text_before(router: HandRouter, stream: int, upto: int) -> bytes:
    """What the router was told to show of the tokens before an index."""
    steps = (message for message in router.said if isinstance(message, Step))
    entries = (entry for step in steps for entry in step.entries if entry.stream == stream)
    return b"".join(entry.text for entry in entries if entry.index < upto)


async def test_a_live_answer_is_taken_over(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a") as mesh:
        undisturbed = mesh.whole("a", max_tokens=500)
        await mesh.routers["a"].ending(undisturbed)
        whole = mesh.answer(undisturbed)

        old = mesh.routers["a"]
        stream = mesh.whole("a", max_tokens=500)
        await old.until(lambda: len(old.tokens.get(stream, ())) >= 5)
        new = await mesh.greet("a")
        told = await attach(new, 900, f"r{stream}", upto=3)
        ending = await old.ending(stream)
        assert isinstance(ending, Failed)
        assert (ending.code, ending.retryable) == ("taken_over", False)

        assert isinstance(told, Attached)
        assert told.submit.request_id == f"r{stream}"
        assert told.ids == whole[: len(told.ids)]
        assert len(told.ids) >= len(old.tokens[stream])
        assert (told.reason, told.cached_tokens > 0) == ("", True)
        assert told.prompt_tokens == old.accepted[stream].prompt_tokens
        shown = text_before(old, stream, 3)
        await new.at_rest()

        # And it goes on: its ids are the forced ids of the next attempt.
        again = mesh.whole("a", max_tokens=500, forced_ids=told.ids)
        await new.ending(again)
        assert told.ids + mesh.answer(again) == whole
        assert shown + told.text + new.text[again] == old.text[undisturbed]
        await new.at_rest()


async def test_what_ended_is_known_for_a_while(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a") as mesh:
        router = mesh.routers["a"]
        stream = mesh.whole("a")
        assert isinstance(await router.ending(stream), Finished)
        told = await attach(router, 900, f"r{stream}")
        assert isinstance(told, Attached)
        assert (told.reason, told.ids) == ("length", mesh.answer(stream))
        assert told.text == router.text[stream]
        told = await attach(router, 901, f"r{stream}", upto=8)
        assert isinstance(told, Attached)
        assert (told.text, told.reason) == (b"", "length")

        for number, name, upto in ((902, f"r{stream}", 9), (903, "r77", 0)):
            refused = await attach(router, number, name, upto)
            assert isinstance(refused, Refused)
            assert (refused.code, refused.retryable) == ("stream_unknown", False)


async def test_a_router_that_died_leaves_its_answers_behind(
    tiny_store: Store, tmp_path: Path
) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a") as mesh:
        old = mesh.routers["a"]
        stream = mesh.whole("a", max_tokens=500)
        await old.until(lambda: len(old.tokens.get(stream, ())) >= 5)
        read = len(old.tokens[stream])
        await old.close()
        new = await mesh.greet("a")
        told = await attach(new, 900, f"r{stream}", upto=read)
        assert isinstance(told, Attached)
        assert told.reason == ""
        assert len(told.ids) >= read
        await new.at_rest()


async def test_both_legs_of_a_split_answer_are_taken_over(
    tiny_store: Store, tmp_path: Path
) -> None:
    """The prefill node knows the beginning, the decode node all of it."""
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        stream = mesh.split("a", "b", max_tokens=500)
        await b.until(lambda: len(b.tokens.get(stream, ())) >= 5)
        first, rest = await asyncio.gather(
            attach(a, 900, f"r{stream}"), attach(b, 901, f"r{stream}")
        )
        assert isinstance(first, Attached)
        assert isinstance(rest, Attached)
        assert (first.submit.leg, rest.submit.leg) == ("prefill", "decode")
        assert first.ids == rest.ids[:1]
        assert len(rest.ids) >= 6
        refused = await attach(a, 902, f"r{stream}", upto=5)
        assert isinstance(refused, Refused), "it would be a stranger's guess"
        ending = await b.ending(stream)
        assert (ending.code, ending.retryable) == ("taken_over", False)  # type: ignore[union-attr]
        await mesh.at_rest()
