"""The cold-start drill against a stand-in for the node: order, proof of coldness, every way out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pop_node.drills import cold_start
from pop_node.drills.cold_start import ColdStarts, Span
from pop_node.drills.pages import resident_pages
from pop_node.drills.report import ColdStartReport, Source
from tests.pop_node.drills.page_world import MAPPER, disk_folder
from wire.errors import PeerError
from wire.messages import COLD_START, Drill, DrillReport, DrillStarted

SPANS: list[Span] = [
    ("process_start", 0.0, 0.02, 0),
    ("imports", 0.02, 0.4, 0),
    ("read", 0.41, 0.6, 40960),
    ("first_token", 0.6, 0.7, 0),
]


@dataclass
class FakeHost:
    """A node that only writes down what the drill wants of it."""

    bundle: Path
    name: str = "ams-1"
    why_not: str = ""
    calls: list[str] = field(default_factory=list)
    resident_at_start: int = -1
    started: asyncio.Event = field(default_factory=asyncio.Event)
    hang: str = ""
    fail: str = ""

    def problem(self, model: str) -> str:
        return self.why_not

    def bundle_path(self, model: str) -> Path:
        return self.bundle

    def engine_pid(self, model: str) -> int | None:
        return None

    async def take_down(self, model: str) -> None:
        await self._done(f"down {model}")

    async def start(self, model: str, source: Source) -> Sequence[Span]:
        with contextlib.suppress(FileNotFoundError):
            self.resident_at_start = sum(
                resident_pages(path).resident for path in self.bundle.iterdir()
            )
        await self._done(f"start {model} {source}")
        self.started.set()
        return SPANS

    async def _done(self, call: str) -> None:
        self.calls.append(call)
        if self.hang and call.startswith(self.hang):
            self.hang = ""
            await asyncio.Event().wait()
        if self.fail and call.startswith(self.fail):
            self.fail = ""
            raise PeerError("the engine does not come up")


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Path]:
    with disk_folder(tmp_path) as folder:
        path = folder / "d1ce"
        path.mkdir()
        (path / "model.data").write_bytes(b"w" * (10 * mmap.PAGESIZE))
        (path / "manifest.json").write_text("{}")
        yield path


async def hold(
    host: FakeHost, aside: Any = None, duration_ms: int = 20_000, **options: object
) -> tuple[DrillStarted, DrillReport | None]:
    said: list[Any] = []
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        drill = Drill(7, COLD_START, "m", duration_ms, json.dumps(options) if options else "")
        ColdStarts(host, tasks, aside).start(drill, 3, said.append)
    assert isinstance(said[0], DrillStarted)
    assert {message.number for message in said} == {7}
    return said[0], said[1] if len(said) > 1 else None


async def test_it_is_taken_down_made_cold_started_and_reported(bundle: Path):
    host = FakeHost(bundle)
    assert resident_pages(bundle / "model.data").resident == 10
    started, said = await hold(host)
    assert not started.error
    assert said is not None
    assert not said.error
    assert host.calls == ["down m", "start m disk"]
    assert host.resident_at_start == 0, "what the start read first was cold"
    report = msgspec.json.decode(said.report, type=ColdStartReport)
    assert (report.node, report.model, report.source) == ("ams-1", "m", "disk")
    assert report.bundle == "d1ce"
    assert report.bundle_bytes == 10 * mmap.PAGESIZE + 2
    assert (report.cold.model_pages, report.cold.model_pages_resident) == (11, 0)
    assert report.cold.model is not None
    assert report.cold.model.resident_before == 11
    assert report.cold.libraries is None
    assert [tuple(msgspec.structs.astuple(phase)) for phase in report.phases] == SPANS
    assert min(report.total_s, report.down_s, report.drop_s) >= 0
    document = json.loads(said.report)
    assert document["from"] == "disk"
    assert document["phases"][2] == {
        "name": "read", "start_s": 0.41, "end_s": 0.6, "bytes": 40960,
    }  # fmt: skip


async def test_libraries_are_dropped_when_asked_and_counted(bundle: Path, monkeypatch):
    library = bundle.parent / "library.so"
    library.write_bytes(b"l" * (5 * mmap.PAGESIZE))
    monkeypatch.setattr(cold_start, "library_files", lambda: [library])
    _, said = await hold(FakeHost(bundle), **{"from": "disk", "libraries": True})
    assert said is not None
    report = msgspec.json.decode(said.report, type=ColdStartReport)
    assert (report.cold.library_pages, report.cold.library_pages_resident) == (5, 0)


@pytest.fixture
def mapper(bundle: Path) -> Iterator[int]:
    """A process that has the bundle's data mapped."""
    process = subprocess.Popen(
        (sys.executable, "-c", MAPPER, str(bundle / "model.data")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"mapped\n"
    yield process.pid
    process.communicate(b"\n", timeout=30)


async def test_pages_that_somebody_maps_end_the_drill_and_the_model_comes_back(
    bundle: Path, mapper: int
):
    host = FakeHost(bundle)
    _, said = await hold(host)
    assert said is not None
    assert not said.report, "a start that was not cold has no figures"
    assert "m cannot be made cold" in said.error
    assert f"process {mapper}" in said.error
    assert host.calls == ["down m", "start m disk"]


@pytest.mark.parametrize("way", ["hang", "fail"])
async def test_a_model_that_was_taken_down_is_started_whatever_happens(bundle: Path, way: str):
    host = FakeHost(bundle, **{way: "down"})
    _, said = await hold(host, duration_ms=50 if way == "hang" else 20_000)
    assert said is not None
    assert ("within 0.05 s" if way == "hang" else "does not come up") in said.error
    assert host.calls == ["down m", "start m disk"]


@pytest.mark.parametrize("way", ["hang", "fail"])
async def test_a_start_that_fails_is_said_and_left_to_the_node(bundle: Path, way: str):
    host = FakeHost(bundle, **{way: "start"})
    _, said = await hold(host, duration_ms=300 if way == "hang" else 20_000)
    assert said is not None
    assert not said.report
    assert said.error
    assert host.calls == ["down m", "start m disk"], "the node tries on by itself"


@pytest.mark.parametrize(
    ("version", "duration_ms", "options", "why_not", "words"),
    [
        (2, 1000, "", "", "version 2"),
        (3, 0, "", "", "may take up to"),
        (3, 4_000_000, "", "", "may take up to"),
        (3, 1000, "{", "", "not understood"),
        (3, 1000, '{"from": "moon"}', "", "moon"),
        (3, 1000, '{"when": 1}', "", "when"),
        (3, 1000, '{"from": "peer"}', "", "brings no model"),
        (3, 1000, "", "this node is draining", "draining"),
    ],
)
async def test_what_is_refused_touches_nothing(
    tmp_path: Path, version: int, duration_ms: int, options: str, why_not: str, words: str
):
    host = FakeHost(tmp_path, why_not=why_not)
    said: list[Any] = []
    async with asyncio.TaskGroup() as tasks:
        drill = Drill(1, COLD_START, "m", duration_ms, options)
        ColdStarts(host, tasks).start(drill, version, said.append)
    (only,) = said
    assert isinstance(only, DrillStarted)
    assert words in only.error
    assert host.calls == []


async def test_one_at_a_time(bundle: Path):
    host = FakeHost(bundle, hang="down")
    said: list[Any] = []
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        drills = ColdStarts(host, tasks)
        drills.start(Drill(1, COLD_START, "m", 100), 3, said.append)
        drills.start(Drill(2, COLD_START, "n", 100), 3, said.append)
        assert said[1] == DrillStarted(2, "a cold start of m is running already")
        await host.started.wait()  # the first one's time is over, and its model starts again
        drills.start(Drill(3, COLD_START, "m", 20_000), 3, said.append)
    assert [(type(one), one.number, bool(one.error)) for one in said[2:]] == [
        (DrillReport, 1, True),
        (DrillStarted, 3, False),
        (DrillReport, 3, False),
    ]


async def test_a_bundle_brought_from_elsewhere_is_put_aside_meanwhile(bundle: Path):
    seen: list[str] = []

    @contextlib.contextmanager
    def aside(model: str) -> Iterator[None]:
        away = bundle.with_name("away")
        bundle.rename(away)
        seen.append(model)
        try:
            yield
        finally:
            away.rename(bundle)

    host = FakeHost(bundle)
    _, said = await hold(host, aside, **{"from": "peer"})
    assert seen == ["m"]
    assert host.calls == ["down m", "start m peer"]
    assert host.resident_at_start == -1, "nothing of it was here"
    assert resident_pages(bundle / "model.data").pages == 10, "it is back"
    assert said is not None
    report = msgspec.json.decode(said.report, type=ColdStartReport)
    assert report.source == "peer"
    assert report.cold.model is None


async def test_a_fetch_that_fails_leaves_the_model_as_it_was(bundle: Path):
    away = bundle.with_name("away")

    @contextlib.contextmanager
    def aside(model: str) -> Iterator[None]:
        bundle.rename(away)
        try:
            yield
        finally:
            away.rename(bundle)

    host = FakeHost(bundle, fail="start m peer")
    _, said = await hold(host, aside, **{"from": "peer"})
    assert said is not None
    assert "does not come up" in said.error
    assert host.calls == ["down m", "start m peer", "start m disk"]
    assert host.resident_at_start >= 0, "its own copy was there again"
