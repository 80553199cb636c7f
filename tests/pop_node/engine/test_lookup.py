"""Guesses against the sentence that defines them."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine.scheduling.lookup import NGRAM, Lookup


def plain_guess(ids: list[int], count: int) -> tuple[int, ...]:
    """What stands after the newest earlier place that ends like ``ids`` does, found by looking."""
    end = ids[-NGRAM:]
    places = [p for p in range(NGRAM, len(ids)) if ids[p - NGRAM : p] == end]
    if len(ids) <= NGRAM or not places:
        return ()
    known = list(ids)
    for at in range(places[-1], places[-1] + count):
        known.append(known[at])
    return tuple(known[len(ids) :])


@given(
    ids=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    asked=st.lists(st.integers(1, 9), max_size=40),
)
def test_it_guesses_what_came_after_the_same_end_whenever_it_is_asked(
    ids: list[int], asked: list[int]
) -> None:
    lookup = Lookup()
    length = 0
    for step in [*asked, len(ids)]:
        length = min(length + step, len(ids))
        known = ids[:length]
        assert lookup.guess(array("i", known), step) == plain_guess(known, step)


def test_a_repetition_is_guessed_beyond_its_end() -> None:
    assert Lookup().guess(array("i", [7, 1, 2, 3, 1, 2, 3]), 7) == (1, 2, 3, 1, 2, 3, 1)


def test_each_token_is_entered_once() -> None:
    """However often it is asked, and however long the text is."""
    lookup, ids = Lookup(), array("i", range(NGRAM))
    for token in range(2000):
        ids.append(token)
        lookup.guess(ids, 8)
    assert len(lookup._after) <= len(ids)
    looked_at = []

    class Watched(array):  # type: ignore[type-arg]
        def __getitem__(self, at: object) -> object:
            looked_at.append(at)
            return super().__getitem__(at)  # type: ignore[index]

    lookup.guess(Watched("i", [*ids, 5]), 8)
    assert len(looked_at) <= 3 + 8


def test_large_ids_are_told_apart() -> None:
    big = 2**31 - 1
    assert Lookup().guess(array("i", [big, 0, 5, 0, big, 0, big]), 1) == (0,)
    assert Lookup().guess(array("i", [big, 0, 5, 0, big]), 1) == ()
