"""A process that starts anew: same process id, pages dropped in between, told what was done."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pop_node.drills import cold_start
from pop_node.drills.cold_start import ColdStarts
from pop_node.drills.pages import resident_pages
from pop_node.drills.rebirth import REBORN, Rebirth, Reborn, cold_of, take_reborn
from pop_node.drills.report import ColdStartReport
from pop_node.engine.start_clock import made_at
from tests.pop_node.drills.page_world import disk_folder
from tests.pop_node.drills.test_cold_start import SPANS, FakeHost
from wire.messages import COLD_START, Drill, DrillReport, DrillStarted

AFTER = """
import json, os, sys
from pop_node.drills.pages import resident_pages
from pathlib import Path
pages = [resident_pages(Path(path)).resident for path in sys.argv[1:]]
print(json.dumps([os.getpid(), pages, sys.stdin.read(), json.loads(os.environ["POPMESH_REBORN"])]))
"""

BEFORE = """
import sys
import msgspec
from pop_node.drills.rebirth import Rebirth
msgspec.json.decode(sys.argv[1], type=Rebirth).become()
"""


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    with disk_folder(tmp_path) as folder:
        path = folder / "model.data"
        path.write_bytes(b"w" * (20 * mmap.PAGESIZE))
        yield path


def rebirth(*files: Path) -> Rebirth:
    names = [str(path) for path in files]
    command = [sys.executable, "-c", AFTER, *names]
    return Rebirth(7, "m", "b00d1e", 81920, names, False, command, time.monotonic())


def test_pages_are_gone_when_the_command_runs_again_in_the_same_process(data: Path):
    assert resident_pages(data).resident == 20
    told = msgspec.json.encode(rebirth(data)).decode()
    process = subprocess.Popen(
        (sys.executable, "-c", BEFORE, told), stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    out, _ = process.communicate(b"not for it", timeout=60)
    pid, pages, read, said = json.loads(out)
    assert pid == process.pid
    assert pages == [0]
    assert read == "", "what was to be done is not the new command's input"
    reborn = msgspec.convert(said, Reborn)
    assert (reborn.number, reborn.model, reborn.problem) == (7, "m", "")
    assert (reborn.cold.model_pages, reborn.cold.model_pages_resident) == (20, 0)
    assert reborn.down_s > 0
    assert reborn.started_at <= time.monotonic()


def test_a_file_that_is_gone_is_a_problem_and_the_node_starts_all_the_same(tmp_path: Path):
    told = rebirth(tmp_path / "gone")
    told.command = [sys.executable, "-c", AFTER]
    process = subprocess.run(
        (sys.executable, "-c", BEFORE, msgspec.json.encode(told).decode()),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert "pages cannot be dropped" in json.loads(process.stdout)[3]["problem"]


def test_what_is_told_is_told_once():
    reborn = Reborn(7, "m", "b", 1, cold_of(None, None), "", 0.1, 0.2, 3.0)
    environment = {REBORN: msgspec.json.encode(reborn).decode(), "HOME": "/"}
    assert take_reborn(environment) == reborn
    assert environment == {"HOME": "/"}
    assert take_reborn(environment) is None
    assert take_reborn({REBORN: "nonsense"}) is None


def test_when_a_process_was_made():
    before = time.monotonic()
    process = subprocess.Popen((sys.executable, "-c", "input()"), stdin=subprocess.PIPE)
    after = time.monotonic()
    try:
        assert before - 0.02 <= made_at(process.pid) <= after + 0.02
    finally:
        process.communicate(b"\n", timeout=30)
    assert made_at(os.getpid()) < before


# ---- the drill ----------------------------------------------------------------------------------


async def told(drills: ColdStarts, **options: object) -> list[Any]:
    said: list[Any] = []
    drill = Drill(9, COLD_START, "m", 20_000, json.dumps(options))
    drills.start(drill, 3, said.append)
    return said


async def test_the_node_leaves_with_what_is_to_be_dropped(data: Path):
    left: list[Rebirth] = []
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        drills = ColdStarts(FakeHost(data.parent), tasks, None, left.append)
        said = await told(drills, whole=True, libraries=True)
    assert said == [DrillStarted(9, "")], "the report is said by whoever comes back"
    (only,) = left
    assert (only.number, only.model, only.libraries) == (9, "m", True)
    assert only.files == [str(data)]
    assert only.command == sys.orig_argv


async def test_the_process_that_came_back_reports_when_it_is_asked(data: Path):
    began = made_at(os.getpid())
    reborn = Reborn(7, "m", "b00d1e", 81920, cold_of(None, None), "", 0.1, 0.2, began)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        drills = ColdStarts(FakeHost(data.parent), tasks, reborn=reborn)
        other = await told(drills, recall=8)
        said = await told(drills, recall=7)
    assert "no drill 8" in other[0].error
    assert said[0] == DrillStarted(9, "")
    assert isinstance(said[1], DrillReport)
    report = msgspec.json.decode(said[1].report, type=ColdStartReport)
    assert [phase.name for phase in report.phases] == ["agent", *(span[0] for span in SPANS)]
    assert report.phases[0].end_s > 0
    assert report.total_s >= report.phases[-1].end_s
    assert report.said_s >= report.phases[0].end_s
    assert (report.down_s, report.drop_s) == (0.1, 0.2)


async def test_a_start_that_was_not_cold_has_no_figures(data: Path):
    reborn = Reborn(7, "m", "b", 1, cold_of(None, None), "3 of 9 pages stay", 0.1, 0.2, 0.0)
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        said = await told(ColdStarts(FakeHost(data.parent), tasks, reborn=reborn), recall=7)
    assert said[1].report == b""
    assert "3 of 9 pages stay" in said[1].error


async def test_a_whole_node_starts_from_its_disk_where_it_can(data: Path):
    host = FakeHost(data.parent)
    async with asyncio.TaskGroup() as tasks:
        nobody = await told(ColdStarts(host, tasks), whole=True)
        peer = await told(
            ColdStarts(host, tasks, lambda _: None, lambda _: None),  # type: ignore[arg-type,return-value]
            **{"whole": True, "from": "peer"},
        )
    assert "starts from its disk" in nobody[0].error
    assert "starts from its disk" in peer[0].error
    assert host.calls == []


async def test_a_node_whose_bundle_is_gone_stays(tmp_path: Path):
    left: list[Rebirth] = []
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        drills = ColdStarts(FakeHost(tmp_path / "gone"), tasks, None, left.append)
        said = await told(drills, whole=True)
    assert said[0] == DrillStarted(9, "")
    assert "no bundle here" in said[1].error
    assert left == []


async def test_a_node_whose_bundle_goes_while_it_is_looked_at_stays(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    def gone(files: list[Path]) -> int:
        raise FileNotFoundError(2, "gone", str(files[0]))

    monkeypatch.setattr(cold_start, "_nbytes", gone)
    left: list[Rebirth] = []
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        drills = ColdStarts(FakeHost(data.parent), tasks, None, left.append)
        said = await told(drills, whole=True)
    assert str(data) in said[1].error
    assert left == []
