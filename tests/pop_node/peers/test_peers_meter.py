"""How fast a node gives, as it says of itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.peers.meter import MEMORY_S, RateMeter


@given(st.floats(1e3, 1e9), st.floats(0.001, 0.1))
def test_a_steady_stream_is_known_after_some_seconds(rate: float, every_s: float) -> None:
    meter, now = RateMeter(), 0.0
    nbytes = round(rate * every_s)
    while now < 8 * MEMORY_S:
        now += every_s
        meter.add(nbytes, now)
    assert meter.rate(now) == pytest.approx(nbytes / every_s, rel=0.1)


@given(st.integers(1, 10**9), st.floats(0.0, 1e6))
def test_silence_fades_and_nothing_is_made_up(nbytes: int, later_s: float) -> None:
    meter = RateMeter()
    assert meter.rate(later_s) == 0.0
    meter.add(nbytes, 5.0)
    assert meter.rate(5.0) == nbytes / MEMORY_S
    assert 0.0 <= meter.rate(5.0 + later_s) <= nbytes / MEMORY_S
    assert meter.rate(5.0 + 20 * MEMORY_S) < nbytes * 1e-8
