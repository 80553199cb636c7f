"""The codec between agent and engine: what it carries, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine import messages as m
from pop_node.engine.boundary import (
    MAX_FRAME_BYTES,
    MessageReader,
    encode,
    receive_setup,
    send_setup,
)
from pop_node.engine.config import EngineConfig
from pop_node.kv_stream.staging import Staging, StagingLayout
from wire.errors import ConfigError, PeerError

T = bytes(range(16))
EVERY_MESSAGE = [
    m.Add(1, "prefill", [1, 2], [3], 9, 0.5, 1.0, 2**64 - 1, [0], b"salt", T),
    m.Drop(1),
    m.Drop(1, 32),
    m.StageFrom(T, 12),
    m.StageFrom(T, 12, [12, 13], 2),
    m.Retarget(T, bytes(16)),
    m.SlotFree(3),
    m.Release(T),
    m.Import(T, 70, 0, 1, 2, 3, 4, 5),
    m.Commit(T, [1, 2]),
    m.Stop(),
    m.Ready(42, 16, 100, 2048, "reference", {"groups": [{"window": None}]}, {"load": 1.5}),
    m.Ready(
        42,
        16,
        100,
        2048,
        "reference",
        {},
        {},
        {"read": 7},
        [("imports", 0.01, 1.5, 0), ("read", 2.0, 2.5, 7)],
    ),
    m.Allocated(1, 16),
    m.Declined(1, "out_of_blocks", "no"),
    m.StepDone([(1, 0, 5, ""), (2, 7, 6, "stop")], 1, 2, 3, 4, 5, 6.0, 7.0, 8),
    m.PrefillDone(1, 0.5, 2.5),
    m.Staged(T, 1, 0, 1, 2, 3, 4, 5, 600),
    m.Staged(T, 1, 0, 1, 2, 3, 4, 5, 600, 1),
    m.Imported(T, 70),
    m.Ended(1),
    m.Beat(0.25),
    m.Crashed("out of memory"),
]


def framed(value: object) -> bytes:
    body = msgpack.packb(value)
    return len(body).to_bytes(4, "little") + body


@given(cut=st.integers(1, 40))
def test_every_message_survives_any_cutting(cut: int) -> None:
    stream = b"".join(encode(message) for message in EVERY_MESSAGE)
    reader = MessageReader()
    got = [x for at in range(0, len(stream), cut) for x in reader.feed(stream[at : at + cut])]
    assert got == EVERY_MESSAGE


@pytest.mark.parametrize(
    "data",
    [
        framed([99]),
        framed([2]),
        framed([2, 1]),
        framed([2, 1, 2, 3]),
        framed([2, "one"]),
        framed([2, True]),
        framed([7, T, [1, "2"]]),
        framed([36, [[1, 2, 3]], 0, 0, 0, 0, 0, 0.0, 0.0, 0]),
        framed([1, 1, "sideways", [], [], 1, 0.0, 1.0, 0, [], b"", b""]),
        framed({"drop": 1}),
        framed([]),
        b"\x01\x00\x00\x00\xc1",
        b"\x02\x00\x00\x00\x02\x02",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
    ],
)
def test_nonsense_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(PeerError) as raised:
        MessageReader().feed(data)
    assert raised.value.code == "protocol_error"


@given(data=st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        MessageReader().feed(data)


def test_the_set_up_carries_the_configuration_and_the_memory() -> None:
    config = EngineConfig(Path("/models/m"), "float32", "reference", 1, 1024, context_tokens=99)
    layout = StagingLayout(slot_bytes=4096, export_slots=2, import_slots=3)
    staging = Staging.create(layout)
    staging.slot(4)[:5] = b"hello"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_setup(ours, config, layout, staging.fd)
        got_config, got_layout, fd = receive_setup(theirs)
    assert (got_config, got_layout) == (config, layout)
    attached = Staging.attach(fd, got_layout)
    assert bytes(attached.slot(4)[:5]) == b"hello"
    attached.close()
    staging.close()


def test_a_set_up_that_never_comes_is_told() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        with pytest.raises(PeerError, match="no set-up"):
            receive_setup(theirs)


@pytest.mark.parametrize(
    "changes", [{"threads": 0}, {"kv_tokens": 3}, {"context_tokens": 1}, {"max_sequences": 513}]
)
def test_an_impossible_configuration_is_refused(changes: dict[str, int]) -> None:
    values = {"kv_tokens": 1024, "threads": 1} | changes
    with pytest.raises(ConfigError):
        EngineConfig(Path("m"), "float32", "reference", **values)  # type: ignore[arg-type]


def test_the_agents_side_leaves_torch_alone() -> None:
    code = "import sys, pop_node.engine.client; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
