"""Which shapes stay plain: by what was measured of each, and never by what was not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine.weight_form import NO_SHAPES, choose
from pop_node.store.machine import Machine
from pop_node.store.weight_choice import (
    DECODE_ROWS,
    DECODE_SHARE,
    PREFILL_ROWS,
    WORST,
    ShapeTimings,
    Timing,
    gain,
    pays_on,
    plain_shapes,
)
from pop_node.store.weight_tables import WeightTable

ROWS = DECODE_ROWS + PREFILL_ROWS
MACHINE = Machine("one", ("avx2",), 2, 1)


def timings(speedup: Callable[[int], float]) -> tuple[Timing, ...]:
    return tuple(Timing(rows, 100.0 * speedup(rows), 100.0) for rows in ROWS)


speedups = st.lists(
    st.floats(0.5, 2.0).map(lambda x: round(x, 3)), min_size=len(ROWS), max_size=len(ROWS)
)


@given(speedups)
def test_faster_everywhere_is_resident_and_one_great_loss_is_plain(found: list[float]) -> None:
    by_rows = dict(zip(ROWS, found, strict=True))
    chosen = pays_on(timings(by_rows.__getitem__))
    if min(found) > 1:
        assert chosen
    if max(found) < 1 or min(found) < WORST - 0.01:
        assert not chosen


@given(speedups, st.sampled_from(ROWS), st.floats(1.001, 3))
def test_more_speed_never_makes_it_plain(found: list[float], rows: int, more: float) -> None:
    by_rows = dict(zip(ROWS, found, strict=True))
    before = pays_on(timings(by_rows.__getitem__))
    by_rows[rows] *= more
    assert pays_on(timings(by_rows.__getitem__)) >= before


@given(speedups, st.floats(0.01, 100))
def test_the_gain_is_a_mean_of_ratios(found: list[float], scale: float) -> None:
    by_rows = dict(zip(ROWS, found, strict=True))
    measured = timings(by_rows.__getitem__)
    assert min(found) - 1e-9 <= gain(measured) <= max(found) + 1e-9
    scaled = [Timing(t.rows, t.plain_us * scale, t.resident_us * scale) for t in measured]
    assert gain(scaled) == pytest.approx(gain(measured))


def test_decode_weighs_as_stated() -> None:
    measured = timings(lambda rows: 2.0 if rows in DECODE_ROWS else 1.0)
    assert gain(measured) == pytest.approx(math.exp(DECODE_SHARE * math.log(2)))
    head = [one for one in measured if one.rows in DECODE_ROWS]  # multiplies no prompts
    assert gain(head) == pytest.approx(2)
    assert gain([]) == 1


def shape(number: int, speedup: float) -> ShapeTimings:
    return ShapeTimings((number, 64), 3, timings(lambda _: speedup))


def test_each_shape_goes_its_own_way() -> None:
    fast, slow = shape(1, 1.3), shape(2, 0.8)
    assert plain_shapes([fast, slow]) == {(2, 64)}
    assert choose(WeightTable(MACHINE, (fast, slow))) == ("resident", {(2, 64)})
    assert choose(WeightTable(MACHINE, (fast,))) == ("resident", frozenset())
    assert choose(WeightTable(MACHINE, (slow,))) == ("plain", NO_SHAPES)
    assert choose(WeightTable(MACHINE, ())) == ("plain", NO_SHAPES)


def test_without_a_table_all_stay_plain() -> None:
    assert choose(None) == ("plain", NO_SHAPES)
