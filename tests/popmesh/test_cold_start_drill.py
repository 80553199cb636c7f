"""The cold-start drill against a stand-in router: what it asks, finds, hands over, and refuses."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from click.testing import CliRunner
from rich.console import Console

from pop_node.drills.report import Phase
from popmesh.cli import main
from popmesh.drill.cold_start import runner
from popmesh.drill.cold_start.report import ColdStartDrill, Regression, make_run
from popmesh.drill.cold_start.runner import ColdStarts, Config
from popmesh.drill.report import write_json
from popmesh.render.cold_start import bar, cold_start_view
from popmesh.render.cold_start_page import cold_start_page
from tests.popmesh.cold_start_world import answer, drill_of, failure, router_said, runs_of
from tests.popmesh.fake_doors import MODEL, FakeMesh, doors
from tests.popmesh.html_page import read_page
from wire.errors import ConfigError, MeshError, PeerError

CONFIG = Config(
    url="",
    key=None,
    model=MODEL,
    node="p1",
    site=None,
    source="disk",
    libraries=True,
    whole=False,
    runs=2,
    budget_s=None,
    longest_s=30.0,
    alone=False,
    directory=Path(),
)


async def hold(mesh: FakeMesh, directory: Path, **changes: Any) -> tuple[ColdStartDrill, list[str]]:
    said: list[str] = []
    async with doors(mesh) as (url,):
        config = replace(CONFIG, url=url, directory=directory, **changes)
        return await ColdStarts(config, said.append).run(), said


def mesh_of(*times_s: float) -> FakeMesh:
    """Starts that take these times, one after the other, whatever the node."""
    left = list(times_s)
    return FakeMesh(cold_start=lambda body: answer(body["node"], left.pop(0)))


async def test_runs_are_asked_for_one_by_one_and_reported(tmp_path: Path):
    mesh = mesh_of(1.0, 3.0)
    report, said = await hold(mesh, tmp_path)
    assert report.passed
    assert [(run.number, run.node, run.time_s) for run in report.runs] == [
        (1, "p1", 1.05),
        (2, "p1", 3.05),
    ]
    assert report.times.max_s == 3.05
    assert [phase.name for phase in report.runs[0].phases][-2:] == ["ready", "in the plan"]
    assert mesh.drills[0] == {
        "node": "p1",
        "fault": "cold-start",
        "model": MODEL,
        "options": {"from": "disk", "libraries": True, "whole": False, "recall": 0},
        "duration_s": 30.0,
        "alone": False,
    }
    assert "p1 will take down and start fake, 2 times, from disk" in said[0]


async def test_a_site_means_every_node_there_in_every_run(tmp_path: Path):
    mesh = mesh_of(*[1.0] * 8)
    report, _ = await hold(mesh, tmp_path, node=None, site="ams")
    assert [body["node"] for body in mesh.drills] == ["p1", "p2", "d1", "d2"] * 2
    assert report.nodes == ["p1", "p2", "d1", "d2"]


async def test_the_budget_is_for_every_run(tmp_path: Path):
    report, _ = await hold(mesh_of(1.0, 3.0), tmp_path, budget_s=2.0)
    assert not report.passed
    assert report.problems == ["1 of 2 runs took longer than 2 s; the longest 3.05 s"]
    report, _ = await hold(mesh_of(1.0, 1.9), tmp_path, budget_s=2.0)
    assert report.passed


async def test_a_start_that_fails_ends_the_drill_with_what_the_node_said(tmp_path: Path):
    answers = [answer("p1", 1.0), failure(502, "drill_failed", "p1: 3 of 9 pages stay")]
    mesh = FakeMesh(cold_start=lambda _: answers.pop(0))
    report, said = await hold(mesh, tmp_path, runs=5)
    assert not report.passed
    assert said[-1] == "  2: p1: 3 of 9 pages stay"
    assert report.problems == ["run 2: p1: 3 of 9 pages stay"]
    assert len(report.runs) == 1
    assert len(mesh.drills) == 2, "not asked for another"


async def test_slower_than_before_is_flagged_and_no_failure(tmp_path: Path):
    for _ in range(2):
        report, _ = await hold(mesh_of(1.0, 1.1), tmp_path)
        assert report.regressions == []
    report, _ = await hold(mesh_of(4.0, 4.0), tmp_path)
    assert [(row.node, row.earlier) for row in report.regressions] == [("p1", 4)]
    assert report.passed
    assert (tmp_path / "history" / "fakemesh" / MODEL / "p1.jsonl").read_text().count("\n") == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"node": "nobody"}, r"no node is called 'nobody' \(known: d1, d2, p1, p2\)"),
        ({"node": None, "site": "mars"}, r"no node is at site 'mars' \(known: ams\)"),
        ({"model": "other"}, r"p1 does not serve other \(it serves fake\)"),
    ],
)
async def test_who_is_not_there_is_said(tmp_path: Path, changes: dict[str, Any], words: str):
    mesh = FakeMesh()
    with pytest.raises(ConfigError, match=words):
        await hold(mesh, tmp_path, **changes)
    assert not mesh.drills


@pytest.mark.parametrize(
    ("refusal", "kind", "words"),
    [
        (failure(409, "drill_refused", "nobody could answer"), MeshError, "nobody could answer"),
        (failure(502, "version_mismatch", "p1 speaks version 2"), PeerError, "version 2"),
        (web.json_response({"total_s": "x"}), PeerError, "reports something else"),
    ],
)
async def test_a_drill_that_cannot_be_held_is_no_drill(tmp_path: Path, refusal, kind, words):
    with pytest.raises(kind, match=words):
        await hold(FakeMesh(cold_start=lambda _: refusal), tmp_path)
    assert not (tmp_path / "history").exists()


def test_a_start_is_ready_in_no_time_when_its_last_phase_ends_it():
    run = make_run(1, router_said(total_s=1.0, phases=[Phase("warm", 0.0, 1.0)]))
    assert [(phase.name, phase.start_s, phase.end_s) for phase in run.phases][:2] == [
        ("warm", 0.0, 1.0),
        ("ready", 1.0, 1.0),
    ]


async def test_a_node_that_is_not_ready_is_waited_for(tmp_path: Path, monkeypatch):
    mesh = mesh_of(1.0, 1.0)
    mesh.away.add("p1")
    monkeypatch.setattr(runner, "LOOK_S", 0.01)
    monkeypatch.setattr(runner, "READY_S", 0.1)
    with pytest.raises(ConfigError, match="fake is not ready on p1"):
        await hold(mesh, tmp_path)
    assert not mesh.drills


# ---- what is handed over ------------------------------------------------------------------------


def test_the_document_reads_back(tmp_path: Path):
    drill = drill_of(runs_of(1.0, 2.0))
    write_json(drill, tmp_path / "report.json")
    said = json.loads((tmp_path / "report.json").read_text())
    assert (said["schema"], said["from"], said["passed"]) == (1, "disk", True)
    assert said["runs"][0]["cold"]["model_pages_resident"] == 0
    assert said["runs"][0]["phases"][3]["bytes"] == 100_000_000
    assert (
        msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=ColdStartDrill) == drill
    )


def test_the_page_has_a_waterfall_for_each_run_and_needs_nothing_else():
    drill = drill_of([*runs_of(1.0, 2.0), *runs_of(1.5, node="d1")])
    page = read_page(cold_start_page(drill))
    page.check_needs_nothing_else()
    assert [tag for tag, _ in page.tags].count("svg") == 3
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert len(bars) == sum(len(run.phases) for run in drill.runs)
    text = " ".join(page.words)
    assert "0 of the model's 1000 pages in memory" in text
    assert "700 of 5000 pages of Python and its libraries; held by popmesh 77" in text


def test_the_page_says_what_others_wrote_only_as_text():
    evil = '<script>alert("x")</script>'
    drill = drill_of(
        runs_of(1.0, node=evil),
        mesh=evil,
        model=evil,
        problems=[evil],
        passed=False,
        regressions=[Regression(evil, 2.0, 1.0, 3, evil, 2.0, 1.0)],
    )
    page = read_page(cold_start_page(drill))
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(evil in text for text in page.words) >= 5


def test_a_drill_without_a_run_has_a_page_and_a_view():
    drill = drill_of([], passed=False, problems=["run 1: it broke"], nodes=["p1"])
    assert read_page(cold_start_page(drill))
    assert "it broke" in shown(drill)


def shown(drill: ColdStartDrill) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(width=160, record=True, file=nowhere)
        console.print(cold_start_view(drill))
        return console.export_text()


def test_the_terminal_shows_the_middle_run_with_bars():
    drill = drill_of(runs_of(1.0, 9.0, 2.0))
    drill.regressions = [Regression("p1", 2.0, 1.0, 3, "read", 1.0, 0.1)]
    text = shown(drill)
    assert "Passed." in text
    assert "p1, run 3: 0 of the model's 1000 pages" in text
    assert "imports" in text
    assert "125 MB/s" in text, "100 MB in the 0.8 s of the middle run"
    assert "█" in text
    assert "slower: p1" in text


@pytest.mark.parametrize(
    ("start_s", "end_s", "whole_s"),
    [(0.0, 1.0, 1.0), (0.5, 0.5, 1.0), (1.0, 1.0, 1.0), (2.0, 3.0, 1.0), (0.0, 0.0, 0.0)],
)
def test_every_phase_has_a_bar_that_is_seen(start_s: float, end_s: float, whole_s: float):
    with open(os.devnull, "w") as nowhere:
        console = Console(width=40, record=True, file=nowhere)
        console.print(bar(start_s, end_s, whole_s))
        assert console.export_text().strip()


def test_the_tables_fit_a_terminal_of_80_columns():
    with open(os.devnull, "w") as nowhere:
        console = Console(width=80, record=True, file=nowhere)
        console.print(cold_start_view(drill_of(runs_of(1.0))))
        text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--node NAME or --site NAME"),
        (["--node", "a", "--site", "b"], "--node NAME or --site NAME"),
        (["--node", "a", "--mesh", "http://127.0.0.1:1"], "no router answers"),
        (["--node", "a", "--mesh", "http://10.255.255.1:1"], "--operator-key"),
        (["--node", "a", "--rate", "7GB/s"], "is for --project"),
        (["--node", "a", "--from", "moon"], "moon"),
        (["--project", "big"], "560GB@8"),
    ],
)
def test_what_cannot_be_held_ends_with_2(arguments: list[str], said: str, tmp_path: Path):
    arguments = ["drill", "cold-start", *arguments, "--report", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert said in result.stderr


async def test_the_command_ends_by_the_budget_and_writes_everything(tmp_path: Path):
    async def run(mesh: FakeMesh, *more: str) -> tuple[int, str, str]:
        async with doors(mesh) as (url,):
            command = [sys.executable, "-m", "popmesh", "drill", "cold-start", "--mesh", url]
            command += ["--node", "p1", "--report", str(tmp_path), *more]
            process = await asyncio.create_subprocess_exec(
                *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            out, err = await process.communicate()
            assert b"Traceback" not in err
            return process.returncode or 0, out.decode(), err.decode()

    code, out, _ = await run(mesh_of(1.0), "--budget", "2s")
    assert code == 0
    assert "Passed." in out
    code, out, err = await run(mesh_of(5.0), "--budget", "2s", "--json")
    assert code == 1
    assert json.loads(out)["problems"]
    assert "p1 will take down and start fake, once, from disk" in err
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "report.json").read_text())["times"]["max_s"] == 5.05
    history = tmp_path / "history" / "fakemesh" / MODEL / "p1.jsonl"
    assert history.read_text().count("\n") == 2
