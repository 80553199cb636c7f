"""The calculation: shapes, rates, and arithmetic that a reader can redo by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from popmesh.cli import main
from popmesh.drill.cold_start.projection import (
    FIXED_S,
    Rates,
    Shape,
    given_rates,
    measured_rates,
    parse_rate,
    parse_shapes,
    project,
)
from popmesh.drill.report import write_json
from tests.popmesh.cold_start_world import drill_of, runs_of
from wire.errors import ConfigError

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "results" / "warm_start.json"
NOWHERE = Path("/nowhere.json")
RATES = Rates(5e9, "here", 2.0, "there")


def popmesh(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["drill", "cold-start", *arguments])


def test_shapes():
    assert parse_shapes("560GB@8,218GB@2") == [Shape(560 * 10**9, 8), Shape(218 * 10**9, 2)]
    assert parse_shapes(" 1.5GiB@1 ") == [Shape(3 * 2**29, 1)]
    assert parse_shapes("123@4") == [Shape(123, 4)]
    assert Shape(10, 4).rank_bytes == 3


@pytest.mark.parametrize(
    "text", ["", "560GB", "@8", "560GB@0", "0GB@8", "560GB@x", "1GB@2,", "-1GB@2"]
)
def test_what_is_no_shape(text: str):
    with pytest.raises(ConfigError, match="560GB@8"):
        parse_shapes(text)


@pytest.mark.parametrize(
    ("text", "rate"), [("7GB/s", 7e9), ("512MiB", 2**29), ("1.5e", None), ("0", None)]
)
def test_rates(text: str, rate: float | None):
    if rate is None:
        with pytest.raises(ConfigError, match="--rate"):
            parse_rate(text)
    else:
        assert parse_rate(text) == rate


def test_the_arithmetic():
    done = project(Shape(560 * 10**9, 8), RATES, 20.0)
    own, shared = done.rows
    assert own.load_s == pytest.approx(70 / 5)
    assert own.total_s == pytest.approx(16.0)
    assert own.within
    assert done.passed
    assert shared.rank_bytes_per_s == pytest.approx(5e9 / 8)
    assert shared.total_s == pytest.approx(2 + 560 / 5)
    assert not shared.within
    assert done.needed_bytes_per_s == pytest.approx(70e9 / 18)
    assert any("here" in text for text in done.assumptions)
    assert any("there" in text for text in done.assumptions)


def test_the_needed_rate_is_just_enough():
    shape = Shape(218 * 10**9, 2)
    needed = project(shape, RATES, 20.0).needed_bytes_per_s
    assert needed is not None
    assert project(shape, Rates(needed * 1.001, "", 2.0, ""), 20.0).passed
    assert not project(shape, Rates(needed * 0.999, "", 2.0, ""), 20.0).passed


def test_one_rank_has_one_row_and_a_late_start_needs_no_drive():
    done = project(Shape(10**9, 1), Rates(1e9, "", 30.0, ""), 20.0)
    assert len(done.rows) == 1
    assert done.needed_bytes_per_s is None
    assert not done.passed


def test_rates_of_a_drill_are_those_of_its_runs(tmp_path: Path):
    path = tmp_path / "report.json"
    write_json(drill_of(runs_of(1.0, 2.0, 4.0)), path)
    rates = measured_rates(path, NOWHERE)
    # The middle run: 2 s, 0.8 s of it load 100 MB, and the router sees it 0.05 s later.
    assert rates.load_bytes_per_s == pytest.approx(100e6 / 0.8)
    assert rates.fixed_s == pytest.approx(2.05 - 0.8)
    assert "3 cold starts of fake (100 MB) on p1" in rates.load_from
    given = given_rates(7e9, path)
    assert (given.load_bytes_per_s, given.fixed_s) == (7e9, rates.fixed_s)


def test_the_larger_model_tells_the_rate_and_the_drill_the_rest(tmp_path: Path):
    path = tmp_path / "report.json"
    write_json(drill_of(runs_of(2.0)), path)
    drill = measured_rates(path, NOWHERE)
    rates = measured_rates(path, BENCHMARK)
    assert rates.load_bytes_per_s == measured_rates(NOWHERE, BENCHMARK).load_bytes_per_s
    assert (rates.fixed_s, rates.fixed_from) == (drill.fixed_s, drill.fixed_from)
    huge = runs_of(2.0)
    huge[0].bundle_bytes = 10**12
    write_json(drill_of(huge), path)
    assert measured_rates(path, BENCHMARK).load_bytes_per_s == drill.load_bytes_per_s


def test_without_a_drill_the_benchmark_tells_and_says_so():
    rates = measured_rates(NOWHERE, BENCHMARK)
    said = json.loads(BENCHMARK.read_text())["summary"]["gbytes_per_s"]["ours"]
    assert rates.load_bytes_per_s == pytest.approx(said * 1e9)
    assert rates.fixed_s == FIXED_S
    assert "assumed" in rates.fixed_from
    with pytest.raises(ConfigError, match="--rate"):
        measured_rates(NOWHERE, NOWHERE)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"summary": {"gbytes_per_s": {"ours": "x"}}, "date": 1}']
)
def test_files_of_something_else_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"file\.json"):
        measured_rates(path, NOWHERE)
    with pytest.raises(ConfigError, match=r"file\.json"):
        measured_rates(NOWHERE, path)


def test_the_command_prints_the_claim_with_its_assumptions(tmp_path: Path):
    done = popmesh("--project", "560GB@8,218GB@2", "--rate", "7GB/s", "--report", str(tmp_path))
    assert done.exit_code == 0
    assert "560 GB on 8 ranks: a calculation, not a measurement" in done.output
    assert "218 GB on 2 ranks" in done.output
    assert "given with --rate" in done.output
    assert "Assumed:" in done.output


def test_the_command_ends_by_the_budget_and_speaks_json(tmp_path: Path):
    shape = ("--project", "560GB@8", "--report", str(tmp_path), "--json")
    slow = popmesh(*shape, "--rate", "1GB/s", "--budget", "20s")
    assert slow.exit_code == 1
    (said,) = json.loads(slow.stdout)
    assert said["rows"][0]["total_s"] == pytest.approx(70 + FIXED_S)
    assert popmesh(*shape, "--rate", "7GB/s", "--budget", "20s").exit_code == 0
    assert popmesh(*shape, "--rate", "1GB/s").exit_code == 0, "no budget, nothing to fail"
