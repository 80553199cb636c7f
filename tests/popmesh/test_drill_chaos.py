"""The whole drill against a stand-in mesh: what it does, what it finds, what it hands over."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from popmesh.cli import main
from popmesh.drill import chaos, crowd, look, world
from popmesh.drill.chaos import Chaos, Config
from popmesh.drill.counters import Growth, parse_metrics
from popmesh.drill.faults import FAULTS
from popmesh.drill.report import Report, write_json
from popmesh.drill.setup import find_model
from popmesh.render.drill import drill_view
from popmesh.render.drill_page import drill_page
from tests.popmesh.fake_doors import MODEL, FakeMesh, doors
from tests.popmesh.html_page import Page, read_page
from wire.errors import ConfigError

CONFIG = Config(
    urls=(),
    api_key=None,
    operator_key=None,
    model=MODEL,
    faults=(FAULTS["kill-agent"], FAULTS["kill-engine"]),
    duration_s=30.0,
    streams=3,
    every_s=0.1,
    kills=2,
    max_down=1,
    deadline_s=20.0,
    seed=1,
    exact=True,
    local=None,
)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(crowd, "ASKS", 6)
    monkeypatch.setattr(look, "LOOK_S", 0.05)
    monkeypatch.setattr(chaos, "LOOK_S", 0.05)
    monkeypatch.setattr(look, "REST_S", 0.5)


async def hold(mesh: FakeMesh, **changes) -> tuple[Report, list[str]]:
    said: list[str] = []
    async with doors(mesh, 2) as urls:
        config = replace(CONFIG, urls=tuple(urls), **changes)
        return await Chaos(config, said.append).run(), said


@pytest.fixture(scope="module")
def passed_report(tmp_path_factory) -> Report:
    """One drill that was passed, for the tests of what is made of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crowd, "ASKS", 6)
        patch.setattr(look, "LOOK_S", 0.05)
        patch.setattr(chaos, "LOOK_S", 0.05)
        return asyncio.run(hold(FakeMesh()))[0]


def test_a_mesh_that_heals_passes(passed_report):
    report = passed_report
    assert report.passed, report.problems
    assert report.verdicts.keys() == {"right"}
    assert [fault.done for fault in report.faults] == [True, True]
    assert {fault.fault for fault in report.faults} == {"kill-agent", "kill-engine"}
    assert all(fault.after_s is not None and fault.after_s >= 0.5 for fault in report.faults)
    assert report.recoveries == {"recompute": 4}, "two doors tell the same two"
    assert report.calm_verdicts == {"right": 6}
    assert report.gaps.count > 0
    assert report.outages.count == 2


async def test_it_says_first_what_it_will_do():
    _, said = await hold(FakeMesh(), kills=1)
    told = said[: next(n for n, line in enumerate(said) if "Asking" in line)]
    assert "fakemesh" in told[0]
    assert any("kill-agent" in line and "SIGKILL" in line for line in told)
    assert any("At most 1 out" in line for line in told)


async def test_a_token_lost_under_a_fault_fails_it():
    report, _ = await hold(FakeMesh(drop_token_under_fault=True))
    assert not report.passed
    assert report.verdicts["missing"] > 0
    assert any("missing" in problem for problem in report.problems)
    assert report.calm_verdicts == {"right": 6}


async def test_a_stream_cut_without_need_fails_it():
    mesh = FakeMesh()
    mesh.break_after = 1
    async with doors(mesh, 2) as urls:
        config = replace(CONFIG, urls=tuple(urls))
        drill = Chaos(config, lambda _: None)
        original = drill._under_faults

        async def cut_one(*args) -> None:
            mesh.break_after = 1
            await original(*args)

        drill._under_faults = cut_one  # type: ignore[method-assign]
        report = await drill.run()
    assert report.verdicts["cut"] == 1
    assert not report.passed


async def test_blocks_that_stay_held_fail_it():
    mesh = FakeMesh()

    class Leaky(set):
        def add(self, node) -> None:
            super().add(node)
            mesh.hold_blocks = True

    mesh.away = Leaky()
    report, _ = await hold(mesh)
    assert any("1 blocks held" in problem for problem in report.problems)


async def test_a_victim_that_stays_away_fails_it(monkeypatch):
    monkeypatch.setattr(world, "RECOVERY_S", 0.4)
    report, _ = await hold(FakeMesh(away_s=2.0))
    assert not report.passed
    assert len(report.faults) == 1, "no more harm to a mesh that does not heal"
    assert "not whole again" in report.faults[0].problem


async def test_nodes_that_refuse_make_it_impossible_before_anything_is_asked():
    mesh = FakeMesh(refusing={"p1", "p2", "d1", "d2"})
    with pytest.raises(ConfigError, match=r"no node takes kill-agent, kill-engine: .*--drills"):
        await hold(mesh)
    assert mesh.requests == 0


async def test_nodes_that_refuse_are_spared():
    mesh = FakeMesh(refusing={"p1", "d1", "d2"})
    report, said = await hold(mesh)
    assert report.passed, report.problems
    assert {fault.victim for fault in report.faults} == {"p2"}
    assert [line for line in said if "Spared" in line] == [
        f"Spared: {name}: not started with --drills" for name in ("p1", "d1", "d2")
    ]


async def test_a_mesh_that_is_not_whole_is_not_drilled():
    mesh = FakeMesh()
    mesh.away.add("d1")
    with pytest.raises(ConfigError, match=r"not whole: d1"):
        await hold(mesh)
    assert mesh.requests == 0


# ---- what is handed over ------------------------------------------------------------------------


def parsed(report: Report) -> Page:
    return read_page(drill_page(report))


def test_the_page_is_whole_and_needs_nothing_else(passed_report):
    page = parsed(passed_report)
    page.check_needs_nothing_else()
    rects = [attributes.get("class") for tag, attributes in page.tags if tag == "rect"]
    assert rects.count("fault") == 2
    assert rects.count("answer right") == len(passed_report.answers)


def test_the_page_says_what_others_wrote_only_as_text(passed_report):
    evil = '<script>alert("x")</script>'
    report = msgspec.json.decode(msgspec.json.encode(passed_report), type=Report)
    report.mesh = evil
    report.problems, report.passed = [evil], False
    report.answers = [
        msgspec.structs.replace(report.answers[0], verdict="error", detail=evil, request_id=evil)
    ]
    page = parsed(report)
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(evil in text for text in page.words) >= 4


def test_a_report_of_nothing_has_a_page(passed_report):
    empty = msgspec.json.decode(msgspec.json.encode(passed_report), type=Report)
    empty.answers, empty.faults = [], []
    assert parsed(empty)


def test_the_document_says_its_schema_and_reads_back(passed_report, tmp_path):
    write_json(passed_report, tmp_path / "report.json")
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["schema"] == 1
    assert said["passed"] is True
    assert (
        msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=Report) == passed_report
    )


def test_the_terminal_gets_the_result_and_the_problems(passed_report):
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(drill_view(passed_report))
    bad = msgspec.json.decode(msgspec.json.encode(passed_report), type=Report)
    bad.passed, bad.problems = False, ["3 answers missing"]
    console.print(drill_view(bad))
    text = console.export_text()
    console.file.close()
    assert "Passed." in text
    assert "Not passed." in text
    assert "- 3 answers missing" in text
    assert "kill-engine" in text


# ---- parts --------------------------------------------------------------------------------------


def test_counters_grow_across_a_restart():
    growth = Growth()
    name = "popmesh_router_recoveries_total"
    for count in (5, 7, 0, 2, 3):
        growth.look("r", parse_metrics(f'{name}{{kind="resume"}} {count}\n'))
    growth.look("other", parse_metrics(f'{name}{{kind="resume"}} 100\n'))
    assert growth.of(name) == {"resume": 5.0}


def test_metrics_are_parsed():
    text = '# HELP a b\na{x="1,\\"2",y="z"} 3\nb 4.5\nnonsense\nc{x="1"} NaN2\n'
    assert parse_metrics(text) == {("a", ('1,\\"2', "z")): 3.0, ("b", ()): 4.5}


async def test_the_model_is_the_first_served_or_the_named_one():
    async with doors(FakeMesh()) as (url,):
        assert await find_model(url, None, None) == MODEL
        assert await find_model(url, None, MODEL) == MODEL
        with pytest.raises(ConfigError, match="serves fake"):
            await find_model(url, None, "other")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mesh", "http://127.0.0.1:1"], "no router answers"),
        (["--mesh", "http://10.255.255.1:1"], "--operator-key"),
        (["--faults", "kill-router"], "kill-router needs --local"),
        (["--faults", "boom"], "no fault is called 'boom'"),
        (["--local", "/nowhere.json"], "/nowhere.json"),
        (["--duration", "0s"], "is no time"),
    ],
)
def test_what_cannot_be_held_ends_with_2(arguments, said):
    result = CliRunner().invoke(main, ["drill", "chaos", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr


async def test_the_command_ends_with_0_or_1_and_writes_both_reports(tmp_path):
    async def run(mesh: FakeMesh, *more: str) -> tuple[int, str]:
        async with doors(mesh) as (url,):
            command = [sys.executable, "-m", "popmesh", "drill", "chaos", "--mesh", url]
            command += ["--streams", "2", "--kills", "1", "--every", "1s"]
            command += ["--faults", "kill-agent", *more]
            process = await asyncio.create_subprocess_exec(
                *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            out, err = await process.communicate()
            assert b"Traceback" not in err
            return process.returncode or 0, out.decode()

    code, out = await run(FakeMesh(), "--report", str(tmp_path / "made"))
    assert code == 0
    assert "Passed." in out
    assert (tmp_path / "made" / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "made" / "report.json").read_text())["passed"]
    code, out = await run(FakeMesh(drop_token_under_fault=True, away_s=3.0), "--json")
    assert code == 1
    assert json.loads(out)["verdicts"]["missing"] > 0
