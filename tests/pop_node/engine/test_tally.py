"""What is counted for penalties, against counting by hand."""

from __future__ import annotations

from array import array
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine.scheduling.tally import Tally


@given(
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    output=st.lists(st.integers(0, 5), max_size=20),
    stops=st.lists(st.integers(0, 20), max_size=6),
    repetition=st.sampled_from([1.0, 1.2]),
)
def test_each_token_once_with_how_often_it_was_said(
    prompt: list[int], output: list[int], stops: list[int], repetition: float
) -> None:
    """However the output came: at once, as for forced ids, or token by token."""
    tally = Tally(repetition, 0.5, 0.0)
    for stop in [*sorted(stops), len(output)]:
        tally.catch_up(array("i", prompt + output[:stop]), len(prompt))
    expected = {token: 0 for token in prompt} if repetition != 1.0 else {}
    expected |= Counter(output)
    assert dict(zip(tally.ids, tally.counts, strict=True)) == expected
    assert len(set(tally.ids)) == len(tally.ids)
