"""The calls and commands that break and heal links, on the real shaper process."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from popmesh.cli import main
from popmesh.links.control import both_ways, cut, disturb, heal
from popmesh.links.doorbell import doorbell_path
from popmesh.links.plan import EmulatedLink, LinkFault, LinkPlan, read_link_plan, write_json
from popmesh.links.plan import ShapedPort as Port
from wire.errors import ConfigError, PeerError

PLAN = LinkPlan(
    [EmulatedLink("ams", "nyc", 80.0, 100.0), EmulatedLink("ams", "fra", 8.0, 50.0)], []
)


@contextmanager
def shaper(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "popmesh", "links", "--plan", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "listening" in process.stderr.readline()
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A shaper's plan, in a directory too deep for a socket's name."""
    directory = tmp_path_factory.mktemp("links") / ("deep" * 25)
    directory.mkdir()
    path = directory / "links.json"
    write_json(path, PLAN)
    with shaper(path):
        yield path


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "plan" in request.fixturenames:
        heal(request.getfixturevalue("plan"))


def test_faults_replace_each_other_by_direction(plan):
    disturb(plan, *both_ways("ams", "nyc", loss=0.05, rtt_ms=200.0))
    disturb(plan, LinkFault("nyc", "ams", down=True))
    now = read_link_plan(plan)
    assert now.figures("ams", "nyc").loss == 0.05
    assert now.figures("ams", "nyc").rtt_s == pytest.approx(0.14)
    assert now.figures("nyc", "ams").down
    assert now.figures("nyc", "ams").loss == 0.0
    assert now.figures("fra", "ams") == PLAN.figures("fra", "ams")


def test_healing_leaves_the_links_own_figures(plan):
    disturb(plan, *both_ways("ams", "nyc", down=True), *both_ways("ams", "fra", down=True))
    heal(plan, "nyc", "ams")
    assert not read_link_plan(plan).figures("ams", "nyc").down
    assert read_link_plan(plan).figures("ams", "fra").down
    heal(plan)
    assert read_link_plan(plan).faults == []


@pytest.mark.parametrize(
    "fault",
    [
        LinkFault("ams", "lhr", down=True),
        LinkFault("ams", "nyc", loss=0.6),
        LinkFault("ams", "nyc", loss=-0.1),
        LinkFault("ams", "nyc", bandwidth_mbps=0.0),
        LinkFault("ams", "nyc", one_way_ms=-1.0),
        LinkFault("ams", "nyc", jitter_ms=float("nan")),
    ],
)
def test_an_impossible_fault_changes_nothing(plan, fault):
    before = plan.read_bytes()
    with pytest.raises(ConfigError):
        disturb(plan, fault)
    assert plan.read_bytes() == before


def test_unknown_pairs_are_told_which_there_are(plan):
    for call in (cut, heal):
        with pytest.raises(ConfigError, match="ams-fra, ams-nyc"):
            call(plan, "nyc", "fra")


def test_calls_at_once_lose_no_change(plan):
    cuts = read_link_plan(plan).by_pair()[frozenset(("ams", "nyc"))].cuts
    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(cut, plan, "ams", "nyc") for _ in range(24)]:
            done.result()
    assert read_link_plan(plan).by_pair()[frozenset(("ams", "nyc"))].cuts == cuts + 24


def test_the_commands(plan):
    def run(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(main, ["links", *words, "--plan", str(plan)])
        assert done.exit_code == code, done.output
        return done.output

    run("set", "ams", "nyc", "--one-way", "--down")
    run("set", "fra", "ams", "--rate-percent", "1", "--rtt-ms", "30", "--loss-percent", "5")
    assert run("show").splitlines() == [
        "ams to nyc: down, 40 ms one way, jitter 0 ms, loss 0 %",
        "nyc to ams: 100 Mbit/s, 40 ms one way, jitter 0 ms, loss 0 %",
        "ams to fra: 0.5 Mbit/s, 15 ms one way, jitter 0 ms, loss 5 %",
        "fra to ams: 0.5 Mbit/s, 15 ms one way, jitter 0 ms, loss 5 %",
    ]
    run("cut", "ams", "nyc")
    run("heal", "ams", "nyc")
    run("heal", "ams", code=2)
    assert "no such link" in run("set", "ams", "lhr", "--down", code=2)
    run("heal")
    assert read_link_plan(plan).faults == []


def test_a_change_holds_when_the_call_returns(tmp_path):
    path = tmp_path / "links.json"
    with socket.create_server(("127.0.0.1", 0)) as target, socket.socket() as spare:
        spare.bind(("127.0.0.1", 0))
        listen = spare.getsockname()
        spare.close()
        address = f"127.0.0.1:{target.getsockname()[1]}"
        ports = [Port(f"127.0.0.1:{listen[1]}", address, "a", "b")]
        write_json(path, LinkPlan([EmulatedLink("a", "b", 2.0, 100.0)], ports))
        target.settimeout(20)
        with shaper(path), socket.create_connection(listen, timeout=20) as client:
            far, _ = target.accept()
            with far:
                far.settimeout(20)
                disturb(path, *both_ways("a", "b", down=True))
                client.sendall(b"held")
                far.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    far.recv(4)
                far.settimeout(20)
                heal(path)
                assert far.recv(4, socket.MSG_WAITALL) == b"held"
                cut(path, "a", "b")
                with pytest.raises(ConnectionResetError):
                    far.recv(1)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)


def test_without_a_shaper_the_call_says_so(tmp_path):
    path = tmp_path / "links.json"
    write_json(path, PLAN)
    with pytest.raises(PeerError, match="no shaper"):
        heal(path)


def test_one_plan_has_one_shaper_and_a_killed_one_leaves_its_place(tmp_path):
    path = tmp_path / "links.json"
    write_json(path, PLAN)
    with shaper(path):
        command = [sys.executable, "-m", "popmesh", "links", "--plan", str(path)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        assert "another shaper" in second.stderr
    assert doorbell_path(path).exists()  # it was killed
    with shaper(path) as process:
        heal(path)
        process.terminate()
        assert process.wait(20) == 0
    assert not doorbell_path(path).exists()
