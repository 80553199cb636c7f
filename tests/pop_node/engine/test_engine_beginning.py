"""What an engine process does beside importing torch, in real processes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import write_tiny_llama

from pop_node.engine import messages as m
from pop_node.engine.beginning import goes_to_device
from pop_node.engine.boundary import MessageReader, encode, send_setup
from pop_node.engine.config import Ahead, EngineConfig
from pop_node.kv_stream.staging import Staging, StagingLayout
from pop_node.store.store import Bundle, Store

LAYOUT = StagingLayout(slot_bytes=4096, export_slots=2, import_slots=2)
WAIT_S = 60.0


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    source = write_tiny_llama(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    store = Store(tmp_path / "store")
    store.add(str(source), "tiny", "float32", lambda *_: None)
    return store.get("tiny")


@contextmanager
def engine_process(
    ahead: Ahead | None = None,
) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """(our end of the socket, the process that waits for its set-up)."""
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT_S)
    with ours:
        with theirs:
            command = [sys.executable, "-m", "pop_node.engine", str(theirs.fileno())]
            command += [ahead.to_argument()] if ahead is not None else []
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
        try:
            yield ours, process
        finally:
            process.kill()
            process.wait()


def first_word(ours: socket.socket) -> Any:
    reader = MessageReader()
    while True:
        data = ours.recv(65536)
        assert data, "the engine said nothing"
        if said := reader.feed(data):
            return said[0]


def set_up(ours: socket.socket, model_dir: Path) -> None:
    staging = Staging.create(LAYOUT)
    config = EngineConfig(model_dir, "float32", "reference", 1, 256)
    send_setup(ours, config, LAYOUT, staging.fd)
    staging.close()


def test_a_bundle_is_read_beside_the_imports(bundle: Bundle) -> None:
    with engine_process() as (ours, process):
        set_up(ours, bundle.path)
        ready = first_word(ours)
        ours.sendall(encode(m.Stop()))
        assert process.wait(WAIT_S) == 0
    assert isinstance(ready, m.Ready)
    spans = {name: (began, ended) for name, began, ended, _ in ready.phases}
    assert spans["load"][0] < spans["imports"][1]
    for part in ("read", "verify", "decode"):
        assert spans["load"][0] <= spans[part][0] <= spans[part][1] <= spans["load"][1]
    assert spans["imports"][1] <= spans["bind"][0]  # perhaps beside the load
    assert max(spans["bind"][1], spans["load"][1]) <= spans["first_token"][0]
    assert ready.phase_bytes["verify"] == bundle.manifest.data.nbytes
    assert {name: nbytes for name, _, _, nbytes in ready.phases if nbytes} == ready.phase_bytes


def test_a_process_started_ahead_takes_its_set_up_later(bundle: Bundle) -> None:
    with engine_process() as (ours, process):
        while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
        set_up(ours, bundle.path)
        assert isinstance(first_word(ours), m.Ready)


@pytest.mark.parametrize("mib", [0, 1024])
def test_what_was_wanted_ahead_is_there_before_the_set_up(bundle: Bundle, mib: int) -> None:
    ahead = Ahead("reference", 1, False, mib << 20, 4 << 20)
    with engine_process(ahead) as (ours, process):
        while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
        set_up(ours, bundle.path)
        ready = first_word(ours)
    assert isinstance(ready, m.Ready)
    spans = {name: (began, ended) for name, began, ended, _ in ready.phases}
    assert spans["imports"][1] <= spans["kernels"][0]
    assert spans["kernels"][1] <= spans["standby"][0]


def test_other_kernels_than_those_ahead_are_loaded_in_time(bundle: Bundle) -> None:
    with engine_process(Ahead("reference", 2, True, 0, 0)) as (ours, _):
        set_up(ours, bundle.path)
        ready = first_word(ours)
    assert isinstance(ready, m.Ready)
    assert ready.backend == "reference"
    assert [name for name, *_ in ready.phases].count("kernels") == 2


def test_damage_is_told_before_a_token(bundle: Bundle) -> None:
    path = bundle.path / bundle.manifest.data.name
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with engine_process() as (ours, process):
        set_up(ours, bundle.path)
        said = first_word(ours)
        assert process.wait(WAIT_S) == 1
    assert isinstance(said, m.Crashed)
    assert "does not match its digest" in said.message


def test_an_agent_that_leaves_before_the_set_up_is_noticed() -> None:
    with engine_process() as (ours, process):
        ours.close()
        assert process.wait(WAIT_S) == 0


def test_reading_needs_no_torch() -> None:
    code = "import json, sys, pop_node.engine.process; print(json.dumps(list(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = json.loads(said.stdout)
    assert "pop_node.store.loader" in loaded
    assert not {"torch", "tokenizers", "safetensors", "aiohttp"} & set(loaded)


def test_a_model_for_an_accelerator_is_not_read_before_torch_has_found_it(tmp_path: Path) -> None:
    driver, nothing = tmp_path, tmp_path / "none"
    assert goes_to_device("auto", driver)
    assert not goes_to_device("auto", nothing)
    assert goes_to_device("triton", nothing)
    assert not goes_to_device("native", driver)
    assert not goes_to_device("reference", driver)
