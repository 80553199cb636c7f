"""The site-loss drill: its accounts, all of it against a stand-in mesh, what it hands over."""

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
from click.testing import CliRunner
from rich.console import Console

from popmesh.cli import main
from popmesh.drill import crowd, look
from popmesh.drill.observation import Observation
from popmesh.drill.report import write_json
from popmesh.drill.site_loss import drill as drills
from popmesh.drill.site_loss.account import Spill, spill, stretch
from popmesh.drill.site_loss.drill import Config, SiteLoss
from popmesh.drill.site_loss.report import SiteLossReport
from popmesh.drill.site_loss.watch import Capacity, SiteWatch
from popmesh.drill.workload import Ask
from popmesh.drill.world import MeshSeen, NodeSeen
from popmesh.render.site_loss import site_loss_view
from popmesh.render.site_loss_page import site_loss_page
from tests.popmesh.fake_doors import MODEL, FakeMesh, doors
from tests.popmesh.html_page import read_page
from wire.errors import ConfigError

SITES = {"p1": "ams", "d1": "ams", "p2": "lhr", "d2": "lhr"}

CONFIG = Config(
    urls=(),
    api_key=None,
    operator_key=None,
    model=MODEL,
    site="lhr",
    away_s=0.6,
    streams=3,
    deadline_s=20.0,
    seed=1,
    exact=True,
    alone=False,
)


# ---- accounts -----------------------------------------------------------------------------------

ASK = Ask(0, "chat", "?", 2, 0.0, 1, True)
BOTH = frozenset(("prefill", "decode"))


def node(name: str, incarnation: str, ready: bool = True) -> NodeSeen:
    return NodeSeen(name, SITES[name], BOTH, frozenset((MODEL,)), incarnation, ready)


def status(**links: str) -> dict[str, Any]:
    """One router's word on nodes: ``name="up:incarnation"``."""
    engine = {"model": MODEL, "ready": True, "total_blocks": 10}
    rows = []
    for name, link in links.items():
        phase, _, incarnation = link.partition(":")
        rows.append(
            {
                "name": name,
                "link": phase,
                "incarnation": incarnation,
                "models": [{"name": MODEL, "block_tokens": 16}],
                "engines": [engine] if phase == "up" else [],
            }
        )
    return {"nodes": rows}


def test_a_loss_is_noticed_when_no_router_has_a_link_and_healed_when_all_are_new():
    watch = SiteWatch(MODEL, ["p1", "d1"])
    whole = MeshSeen((node("p1", "1"), node("d1", "1"), node("p2", "1")), ())
    everywhere = status(p1="up:1", d1="up:1", p2="up:1")
    watch.look({"r": everywhere}, whole, 1.0)
    assert watch.capacity == Capacity(3, 3 * 160)
    assert watch.noticed_at is None
    watch.struck(whole)
    half = status(p1="connecting:", d1="up:1", p2="up:1")
    gone = status(p1="connecting:", d1="connecting:", p2="up:1")
    watch.look({"r": half, "s": gone}, whole, 2.0)
    assert watch.noticed_at is None, "one router still has a link"
    watch.look({"r": gone, "s": None}, whole, 3.0)
    assert watch.noticed_at == 3.0
    assert watch.capacity == Capacity(1, 160)
    one = MeshSeen((node("p1", "2"), node("d1", "1", ready=False)), ())
    watch.look({"r": everywhere}, one, 4.0)
    assert watch.whole_at is None
    assert watch.reborn(one) == {"p1"}
    stale = MeshSeen((node("p1", "2"), node("d1", "1")), ())
    watch.look({"r": everywhere}, stale, 5.0)
    assert watch.whole_at is None, "d1 is the one that was there before"
    new = MeshSeen((node("p1", "2"), node("d1", "2")), ())
    watch.look({"r": everywhere}, new, 6.0)
    watch.look({"r": everywhere}, new, 7.0)
    assert watch.whole_at == 6.0


def test_a_site_that_is_back_within_one_look_was_noticed_all_the_same():
    watch = SiteWatch(MODEL, ["p1"])
    watch.struck(MeshSeen((node("p1", "1"),), ()))
    back = MeshSeen((node("p1", "2"),), ())
    watch.look({"r": status(p1="up:2")}, back, 2.0)
    watch.look({"r": status(p1="up:2")}, back, 2.5)
    assert (watch.noticed_at, watch.whole_at) == (2.0, 2.5)


def test_routers_that_do_not_answer_notice_nothing():
    watch = SiteWatch(MODEL, ["p1"])
    watch.struck(MeshSeen((node("p1", "1"),), ()))
    watch.look({"r": None}, MeshSeen((), ()), 2.0)
    assert watch.noticed_at is None


def seen(request_id: str, started_s: float, *arrivals: float, complete: bool = True) -> Observation:
    one = Observation(ASK, 0, started_s, request_id)
    one.arrivals = list(arrivals)
    one.text, one.completion_tokens, one.finish_reason = "ab", 2, "length"
    one.complete, one.ended_s = complete, max(arrivals, default=started_s)
    return one


def test_spill_is_the_last_request_that_was_sent_to_the_dead_first():
    answers = [
        seen("before", 9.0),
        seen("late", 10.5),
        seen("later", 11.25),
        seen("elsewhere", 12.0),
        seen("returned", 40.0),
        seen("unknown", 11.9),
    ]
    routes = {
        "before": [("p1", "d1")],
        "late": [("p1", "d2"), ("p2", "d2")],
        "later": [("p2", "d1"), ("p2", "d2")],
        "elsewhere": [("p2", "d2"), ("p1", "d1")],
        "returned": [("p1", "d1")],
    }
    assert spill(answers, routes, ["p1", "d1"], 10.0, 30.0) == Spill(2, 1.25)
    assert spill(answers, routes, ["p1", "d1"], 13.0, 30.0) == Spill(0, 0.0)


def test_a_stretch_counts_answers_by_their_beginning_and_texts_by_their_coming():
    cut = seen("cut", 12.0, 12.5, complete=False)
    answers = [seen("early", 9.0, 9.5, 10.5), seen("in", 11.0, 11.25, 11.5), cut]
    done = stretch("lost", 10.0, 20.0, answers, {0: seen("", 0.0)}, Capacity(2, 320))
    assert (done.answers, done.verdicts) == (2, {"right": 1, "cut": 1})
    assert done.texts_per_s == pytest.approx(4 / 10)
    assert done.ttft.count == 2
    assert done.gaps.max_s == pytest.approx(0.25)
    assert (done.nodes_ready, done.kv_tokens) == (2, 320)
    assert stretch("none", 5.0, 5.0, answers, {0: seen("", 0.0)}, Capacity()).texts_per_s == 0


# ---- the whole of it ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(crowd, "ASKS", 6)
    monkeypatch.setattr(drills, "STEADY_S", 0.3)
    monkeypatch.setattr(drills, "LOOK_S", 0.02)
    monkeypatch.setattr(look, "REST_S", 0.5)


async def hold(mesh: FakeMesh, **changes: Any) -> tuple[SiteLossReport, list[str]]:
    said: list[str] = []
    mesh.sites, mesh.links_drop = SITES, True
    async with doors(mesh, 2) as urls:
        config = replace(CONFIG, urls=tuple(urls), **changes)
        return await SiteLoss(config, said.append).run(), said


async def test_a_site_dies_and_comes_back():
    mesh = FakeMesh()
    report, said = await hold(mesh)
    assert report.problems == []
    assert report.passed
    assert [(body["node"], body["fault"]) for body in mesh.drills] == [
        ("p2", "lose-agent"),
        ("d2", "lose-agent"),
    ]
    assert {body["duration_s"] for body in mesh.drills} == {0.6}
    assert report.nodes == ["p2", "d2"]
    assert report.verdicts.keys() == {"right"}
    assert report.noticed_s is not None
    assert report.whole_s is not None
    assert report.answered_s is not None
    assert (report.spilled, report.spill_s) == (0, 0.0), "requests went to ams all the time"
    assert mesh.sent_to[0] in (("p2", "d2"), ("p2", "d1"), ("p1", "d2"))
    names = [one.name for one in report.stretches]
    assert names == ["before", "lost", "coming back", "after"]
    assert [one.nodes_ready for one in report.stretches][::3] == [4, 4]
    assert report.stretches[1].nodes_ready == 2
    assert all(fault.after_s is not None for fault in report.faults)
    assert "site lhr is lost for 0.6 s, that is p2, d2 of 4 nodes" in said[0]


async def test_requests_that_still_go_there_are_counted():
    report, _ = await hold(FakeMesh(), site="ams")
    assert report.spilled > 0
    assert 0 < report.spill_s <= CONFIG.away_s


async def test_a_site_that_stays_away_fails_it(monkeypatch):
    monkeypatch.setattr(drills, "RECOVERY_S", 0.3)
    report, _ = await hold(FakeMesh(gone_for_good={"d2"}))
    assert not report.passed
    assert report.whole_s is None
    assert any("d2 was not ready" in problem for problem in report.problems)


async def test_a_token_lost_meanwhile_fails_it():
    report, _ = await hold(FakeMesh(drop_token_under_fault=True))
    assert not report.passed
    assert report.stretches[1].verdicts["missing"] > 0
    assert report.stretches[0].verdicts.keys() == {"right"}


async def test_one_node_that_refuses_makes_it_impossible_before_anything_is_asked():
    mesh = FakeMesh(refusing={"p1", "p2"})
    with pytest.raises(ConfigError, match=r"^p2: not started with --drills"):
        await hold(mesh)
    assert mesh.requests == 0
    assert not mesh.drills


async def test_who_cannot_be_spared_is_not_lost_unless_told_so():
    mesh = FakeMesh(nodes={"p1": 1, "d1": 1, "p2": 1})
    with pytest.raises(ConfigError, match="without ams nobody could answer"):
        await hold(mesh, site="ams")
    with pytest.raises(ConfigError, match=r"no node is at site 'mars' \(known: ams, lhr\)"):
        await hold(mesh, site="mars")
    assert not mesh.drills


# ---- what is handed over ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held() -> SiteLossReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crowd, "ASKS", 6)
        for name, value in (("STEADY_S", 0.3), ("LOOK_S", 0.02)):
            patch.setattr(drills, name, value)
        return asyncio.run(hold(FakeMesh()))[0]


def test_the_document_reads_back(held: SiteLossReport, tmp_path: Path):
    write_json(held, tmp_path / "report.json")
    data = (tmp_path / "report.json").read_bytes()
    assert msgspec.json.decode(data, type=SiteLossReport) == held
    assert json.loads(data)["schema"] == 1


def test_the_page_is_whole_and_says_what_others_wrote_only_as_text(held: SiteLossReport):
    page = read_page(site_loss_page(held))
    page.check_needs_nothing_else()
    rects = [attributes.get("class") for tag, attributes in page.tags if tag == "rect"]
    assert rects.count("fault") == 2
    evil = '<script>alert("x")</script>'
    bad = msgspec.structs.replace(held, site=evil, mesh=evil, problems=[evil], passed=False)
    page = read_page(site_loss_page(bad))
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(evil in text for text in page.words) >= 4


def test_the_terminal_tells_it_in_the_order_of_time(held: SiteLossReport):
    with open(os.devnull, "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        console.print(site_loss_view(held))
        never = msgspec.structs.replace(
            held, passed=False, problems=["it broke"], whole_s=None, answered_s=None
        )
        console.print(site_loss_view(never))
        text = console.export_text()
    assert "Site lhr (p2, d2) was lost for 0.6 s" in text
    assert "coming back" in text
    assert "- it broke" in text
    assert "all of it ready after never" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--site"),
        (["--site", "ams", "--mesh", "http://127.0.0.1:1"], "no router answers"),
        (["--site", "ams", "--mesh", "http://10.255.255.1:1"], "--operator-key"),
        (["--site", "ams", "--duration", "2h"], "1 h at most"),
    ],
)
def test_what_cannot_be_held_ends_with_2(arguments: list[str], said: str):
    result = CliRunner().invoke(main, ["drill", "site-loss", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr


async def test_an_interrupted_drill_leaves_no_traceback(tmp_path: Path):
    mesh = FakeMesh(sites=SITES, links_drop=True)
    async with doors(mesh) as (url,):
        command = [sys.executable, "-m", "popmesh", "drill", "site-loss", "--mesh", url]
        command += ["--site", "lhr", "--streams", "2", "--json"]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        assert b"site lhr is lost for 30 s" in await process.stderr.readline()
        process.terminate()
        out, err = await process.communicate()
    assert process.returncode == 2
    assert out == b""
    assert b"interrupted" in err
    assert b"Traceback" not in err
