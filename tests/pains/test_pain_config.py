"""Settings that are dropped, mean something else, or are not zero when they say 0."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import popmesh.launcher.session
import popmesh.signals
import router.main
from pop_node import agent
from popmesh.cli import main
from router.links.node_connection import NodeConnection
from tests.router.router_mesh import RouterMesh, running_mesh
from tests.topology.topology_text import LINES, VALID
from topology.load import dump_topology, parse_topology
from wire.errors import ConfigError

NUMBERS = [n for n, line in enumerate(LINES) if re.search(r": -?[0-9.]+$", line)]
KEYS = [n for n, line in enumerate(LINES) if re.match(r" *[a-z0-9_-]+:", line)]


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What commands would have started, instead of starting it."""
    seen: list[Any] = []
    monkeypatch.setattr(router.main, "run", lambda config, ready: seen.append(config))
    monkeypatch.setattr(agent, "serve", seen.append)
    monkeypatch.setattr(popmesh.signals, "run_until_signal", lambda serve: serve())
    monkeypatch.setattr(
        popmesh.launcher.session, "run_mesh", lambda options, *rest: seen.append(options)
    )
    return seen


def changed(one: Any, other: Any) -> dict[str, Any]:
    """Fields in which two configurations differ, with the values of the second."""
    names = [field.name for field in dataclasses.fields(one)]
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return {name: after for name, (before, after) in pairs.items() if before != after}


UP: list[tuple[list[str], dict[str, Any]]] = [
    (["--port", "4711"], {"port": 4711}),
    (["--registry", "consul://127.0.0.1:1"], {"registry_url": "consul://127.0.0.1:1"}),
    (["--registry", "embedded"], {}),
    (["--no-emulate-links"], {"emulate_links": False}),
    (["--ready-file", "r.json"], {"ready_file": Path("r.json")}),
    (["--log-dir", "logs"], {"log_dir": Path("logs")}),
    (["--store", "models"], {"store": Path("models")}),
]
ROUTER: list[tuple[list[str], dict[str, Any]]] = [
    (["--listen", "127.0.0.1:9"], {"listen_host": "127.0.0.1", "listen_port": 9}),
    (["--mmdb", "geo.mmdb"], {"mmdb": Path("geo.mmdb")}),
    (["--name", "router-1"], {}),
    (["--registry", "consul://127.0.0.1:2"], {"registry_url": "consul://127.0.0.1:2"}),
]
NODE: list[tuple[list[str], dict[str, Any]]] = [
    (["--store", "models"], {"store": Path("models")}),
    (["--status-file", "s.json"], {"status_file": Path("s.json")}),
    (["--registry", "consul://127.0.0.1:2"], {"registry_url": "consul://127.0.0.1:2"}),
]
CASES = [("up", *case) for case in UP]
CASES += [("router", *case) for case in ROUTER] + [("node", *case) for case in NODE]


@pytest.mark.parametrize(
    ("command", "options", "effect"), CASES, ids=[f"{c} {' '.join(o)}" for c, o, _ in CASES]
)
def test_vllm_router_46_an_option_does_what_it_says_and_nothing_else(
    configured: list[Any],
    tmp_path: Path,
    command: str,
    options: list[str],
    effect: dict[str, Any],
) -> None:
    """vllm-project/router 46: the flag that asks for one kind of disaggregation silently started
    another, because the path from the command line to the configuration had a gap. Every option
    lands in its own field, and moves no other."""
    file = tmp_path / "mesh.yaml"
    file.write_text(VALID)
    base = {
        "up": ["up", str(file)],
        "router": ["router", "--topology", str(file), "--registry", "consul://127.0.0.1:1"],
        "node": ["node", "fra-1", "--topology", str(file), "--registry", "consul://127.0.0.1:1"],
    }[command]
    for arguments in (base, [*base, *options]):
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    plain, wanted = configured
    assert changed(plain, wanted) == effect


@pytest.mark.parametrize(
    "arguments",
    [
        ["up", "{file}", "--emulate-links"],
        ["up", "{file}", "--no-emulate"],
        ["up", "{file}", "--port", "0"],
        ["node", "fra-1", "--topology", "{file}", "--registry", "r", "--decode"],
        ["node", "fra-1", "--topology", "{file}", "--reg", "consul://127.0.0.1:1"],
        ["router", "--topology", "{file}", "--registry", "r", "--pd-disaggregation"],
    ],
)
def test_vllm_router_46_what_is_no_option_starts_nothing(
    configured: list[Any], tmp_path: Path, arguments: list[str]
) -> None:
    """vllm-project/router 46: words that mean nothing here are refused, shortened ones too, rather
    than taken for the next best."""
    file = tmp_path / "mesh.yaml"
    file.write_text(VALID)
    result = CliRunner().invoke(main, [word.format(file=file) for word in arguments])
    assert result.exit_code == 2
    assert configured == []


def test_vllm_router_46_a_node_has_the_roles_of_its_line(
    configured: list[Any], tmp_path: Path
) -> None:
    """vllm-project/router 46: there is one place that says who prefills and who decodes."""
    file = tmp_path / "mesh.yaml"
    file.write_text(VALID)
    for name, roles in (("fra-1", {"prefill"}), ("iad-1", {"prefill", "decode"})):
        arguments = ["node", name, "--topology", str(file), "--registry", "consul://127.0.0.1:1"]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        assert configured[-1].node.roles == roles


@pytest.mark.parametrize("number", KEYS, ids=[LINES[n].strip() for n in KEYS])
def test_aibrix_2746_no_unknown_key_is_dropped(number: int) -> None:
    """vllm-project/aibrix 2746: misspelt keys of a configuration vanished, and the default ran in
    production. A key that nobody knows is an error at every depth of the file, with its line."""
    line = LINES[number]
    bogus = line[: len(line) - len(line.lstrip())] + "coffee_cups: 2"
    text = "\n".join([*LINES[:number], bogus, *LINES[number:]]) + "\n"
    with pytest.raises(ConfigError) as caught:
        parse_topology(text, "mesh.yaml")
    assert "coffee_cups" in str(caught.value) or f"mesh.yaml:{number + 1}" in str(caught.value)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every scalar of a document by its place."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(key), item) for key, item in enumerate(value)]
    else:
        return {path: value}
    return {k: v for key, item in items for k, v in leaves(item, f"{path}/{key}").items()}


@pytest.mark.parametrize("number", NUMBERS, ids=[LINES[n].strip() for n in NUMBERS])
def test_aibrix_2746_zero_is_a_value(number: int) -> None:
    """vllm-project/aibrix 2746: a setting of 0 counted as "not set", and the default came back. In
    the topology a zero is either what the mesh gets, or an error that names the key."""
    key, _, value = LINES[number].partition(":")
    text = "\n".join([*LINES[:number], f"{key}: 0", *LINES[number + 1 :]]) + "\n"
    before = leaves(yaml.safe_load(dump_topology(parse_topology(VALID, "mesh.yaml"))))
    try:
        topology = parse_topology(text, "mesh.yaml")
    except ConfigError as error:
        assert key.strip() in str(error)  # noqa: PT017
        return
    after = leaves(yaml.safe_load(dump_topology(topology)))
    moved = {
        place for place in before.keys() | after.keys() if before.get(place) != after.get(place)
    }
    assert [after.get(place) for place in moved] == [0], f"{key.strip()} was {value.strip()}"


async def test_aibrix_2746_zero_is_a_value_in_requests_too(mesh: RouterMesh) -> None:
    """vllm-project/aibrix 2746, said by clients: temperature 0 and seed 0 are what they say, and a
    zero that makes no sense is refused."""
    response = await mesh.chat(temperature=0, seed=0)
    assert response.status == 200
    for node in ("fra-1", "lhr-1"):
        sampling = mesh.nodes[node].submits[-1].sampling
        assert (sampling.temperature, sampling.seed) == (0.0, 0)
    for nonsense in ({"max_tokens": 0}, {"top_p": 0}, {"n": 0}, {"max_completion_tokens": 0}):
        refused = await mesh.chat(**nonsense)
        assert refused.status == 400
        assert (await refused.json())["error"]["param"] in nonsense


async def test_aibrix_2746_zero_is_a_measurement_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vllm-project/aibrix 2746, in what operators read: a round trip that the clock shows as zero
    is a measured one, and its series does not come and go."""

    def measure(connection: NodeConnection, rtt_ms: float) -> None:
        connection.rtt_ms = 0.0
        connection._on_rtt(0.0)

    monkeypatch.setattr(NodeConnection, "_measure", measure)
    async with running_mesh(monkeypatch) as mesh, asyncio.timeout(20):
        nodes = (await mesh.get_json("/popmesh/status"))["nodes"]
        while not all(node["rtt_measured"] for node in nodes):
            await asyncio.sleep(0.01)
            nodes = (await mesh.get_json("/popmesh/status"))["nodes"]
        text = await (await mesh.http.get("/metrics")).text()
        for name in mesh.nodes:
            assert f'popmesh_link_rtt_seconds{{node="{name}"}} 0' in text
