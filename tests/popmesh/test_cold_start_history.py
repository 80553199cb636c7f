"""Earlier runs: what is remembered, what is compared with what, what counts as slower."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popmesh.drill.cold_start.history import (
    MAX_LINES,
    MIN_EARLIER,
    Line,
    append_history,
    history_file,
    lines_of,
    read_history,
    regressions,
)
from tests.popmesh.cold_start_world import drill_of, runs_of


def line(time_s: float, **changes: object) -> Line:
    values = {"started": "t", "source": "disk", "libraries": False, "whole": False, "bundle": "b"}
    values |= {"bundle_bytes": 1, "time_s": time_s, "phases": {"read": time_s / 2, "warm": 0.1}}
    return Line(**(values | changes))  # type: ignore[arg-type]


def test_a_slower_node_is_flagged_with_the_phase_that_grew():
    now = line(3.0, phases={"imports": 2.4, "read": 0.5, "warm": 0.1})
    before = [line(t, phases={"imports": 0.4, "read": 0.5, "warm": 0.1}) for t in (0.9, 1.0, 1.1)]
    (found,) = regressions({"n": [now]}, {"n": before})
    assert (found.node, found.now_s, found.earlier_s, found.earlier) == ("n", 3.0, 1.0, 3)
    assert (found.phase, found.phase_now_s, found.phase_earlier_s) == ("imports", 2.4, 0.4)
    assert "3.00 times the median of 3 earlier runs" in found.words()
    assert "imports: 2.40 s, before 0.40 s" in found.words()


@pytest.mark.parametrize(
    ("now_s", "before", "flagged"),
    [
        (1.25, [1.0] * 3, False),
        (1.26, [1.0] * 3, True),
        (9.0, [1.0] * (MIN_EARLIER - 1), False),
        (0.29, [0.1] * 5, False),  # three times as long, and no second of anybody's life
        (0.31, [0.1] * 5, True),
        (9.0, [1.0, 1.0, 8.0, 8.0, 8.0], False),
        (0.5, [1.0] * 5, False),
    ],
)
def test_the_threshold(now_s: float, before: list[float], flagged: bool):
    found = regressions({"n": [line(now_s)]}, {"n": [line(t) for t in before]})
    assert bool(found) is flagged


@pytest.mark.parametrize(
    "changes", [{"source": "peer"}, {"libraries": True}, {"whole": True}, {"bundle": "other"}]
)
def test_only_runs_of_one_kind_are_compared(changes: dict[str, object]):
    before = [line(0.1, **changes)] * 5
    assert regressions({"n": [line(9.0)]}, {"n": before}) == []
    assert regressions({"n": [line(9.0)]}, {"n": before + [line(1.0)] * 3})[0].earlier == 3


def test_other_nodes_are_not_compared():
    assert regressions({"n": [line(9.0)]}, {"m": [line(0.1)] * 5}) == []


@given(st.lists(st.floats(0.01, 1e4), min_size=3), st.floats(0.01, 1e4))
def test_what_is_no_slower_than_before_is_never_flagged(before: list[float], now_s: float):
    found = regressions({"n": [line(now_s)]}, {"n": [line(t) for t in before]})
    if now_s <= sorted(before)[(len(before) - 1) // 2]:
        assert not found


def test_lines_come_back_and_a_half_line_is_skipped(tmp_path: Path):
    path = history_file(tmp_path, "mesh", "a/model", "n")
    assert read_history(path) == []
    append_history(path, [line(1.0), line(2.0)])
    with path.open("ab") as file:
        file.write(b'{"started": "killed her')
    append_history(path, [line(3.0)])
    assert [one.time_s for one in read_history(path)] == [1.0, 2.0, 3.0]


def test_only_the_newest_lines_are_looked_at(tmp_path: Path):
    path = history_file(tmp_path, "m", "m", "n")
    append_history(path, [line(float(number + 1)) for number in range(MAX_LINES + 5)])
    found = read_history(path)
    assert len(found) == MAX_LINES
    assert found[-1].time_s == MAX_LINES + 5


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", "ok-1.2"])
def test_names_stay_in_the_folder(tmp_path: Path, name: str):
    path = history_file(tmp_path, name, name, name)
    assert path.resolve().relative_to(tmp_path.resolve()).parts[0] == "history"
    assert len(path.relative_to(tmp_path).parts) == 4


def test_a_drills_runs_are_remembered_by_node():
    drill = drill_of([*runs_of(1.0, 2.0), *runs_of(4.0, node="d1")])
    found = lines_of(drill)
    assert {node: [one.time_s for one in lines] for node, lines in found.items()} == {
        "p1": [1.05, 2.05],
        "d1": [4.05],
    }
    remembered = found["p1"][0]
    assert remembered.bundle == "b00d1e"
    assert remembered.phases["imports"] == pytest.approx(0.45)
    assert msgspec.json.decode(msgspec.json.encode(remembered), type=Line) == remembered
