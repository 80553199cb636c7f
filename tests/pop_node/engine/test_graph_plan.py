"""Which bucket a step runs in, and in which order buckets are captured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine.running.graph_plan import Bucket, GraphPlan

sizes = st.tuples(st.integers(1, 300), st.integers(1, 200_000))


def everything(plan: GraphPlan) -> list[Bucket]:
    captured: list[Bucket] = []
    while (bucket := plan.missing(captured)) is not None:
        captured.append(bucket)
    return captured


@given(sizes=sizes, data=st.data())
def test_a_step_runs_in_the_smallest_bucket_that_holds_it(
    sizes: tuple[int, int], data: st.DataObject
) -> None:
    plan = GraphPlan(*sizes)
    rows = data.draw(st.integers(1, sizes[0]))
    longest = data.draw(st.integers(1, sizes[1]))
    bucket = plan.bucket(rows, longest)
    assert bucket is not None
    buckets = everything(plan)
    assert bucket in buckets
    holding = [b for b in buckets if b.rows >= rows and b.context >= longest]
    assert bucket.rows == min(b.rows for b in holding)
    assert bucket.context == min(b.context for b in holding)
    # Padding costs little: under a tile of rows, and splits of keys are at least half in use.
    assert bucket.rows < max(2 * rows, rows + 16)
    assert bucket.context <= max(1024, 2 * longest)


@given(sizes=sizes)
def test_all_buckets_are_captured_once_and_few_of_them_first(sizes: tuple[int, int]) -> None:
    plan = GraphPlan(*sizes)
    buckets = everything(plan)
    assert len(set(buckets)) == len(buckets) <= 24 * 9
    first = plan.first()
    assert set(first) <= set(buckets)
    assert len(first) <= 2
    assert {b.rows for b in first} == {1, sizes[0]}
    assert plan.missing(set(buckets)) is None


@pytest.mark.parametrize("step", [(65, 10), (64, 8193)])
def test_what_is_larger_than_the_engine_has_no_bucket(step: tuple[int, int]) -> None:
    assert GraphPlan(64, 8192).bucket(*step) is None


def test_the_buckets_of_a_usual_engine() -> None:
    buckets = everything(GraphPlan(64, 8192))
    assert [b.rows for b in buckets[:8]] == [1, 2, 4, 8, 16, 32, 48, 64]
    assert sorted({b.context for b in buckets}) == [1024, 2048, 4096, 8192]
    assert buckets[0] == Bucket(1, 1024)
