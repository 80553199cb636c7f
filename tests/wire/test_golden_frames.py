"""Frames as they go over the wire, byte for byte, and as version 1 wrote them.

Neighbouring versions understand each other: what version 1 wrote is read, and what it does not know
is only appended.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from tests.wire.wire_samples import NODE_SAYS, ROUTER_SAYS
from wire.framing import encode, node_side_reader, router_side_reader
from wire.messages import NodeMessage, RouterMessage

GOLDEN, OLD = (
    json.loads((Path(__file__).parent / "golden" / f"frames-v{version}.json").read_text())
    for version in (2, 1)
)
BOTH = NODE_SAYS | ROUTER_SAYS
FRAMES = [(name, golden[name]) for golden in (GOLDEN, OLD) for name in golden]


@pytest.mark.parametrize("name", BOTH)
def test_a_message_is_written_as_it_always_was(name):
    assert encode(BOTH[name]).hex() == GOLDEN[name], "the wire has changed: raise MAX_VERSION"


@pytest.mark.parametrize(("name", "frame"), [f for f in FRAMES if f[0] in NODE_SAYS])
def test_a_node_of_either_version_is_understood(name, frame):
    assert router_side_reader().feed(bytes.fromhex(frame)) == [NODE_SAYS[name]]


@pytest.mark.parametrize(
    ("name", "frame"), [f for f in FRAMES if f[0] in ROUTER_SAYS and f[0] != "part"]
)
def test_a_router_of_either_version_is_understood(name, frame):
    assert node_side_reader().feed(bytes.fromhex(frame)) == [ROUTER_SAYS[name]]


@pytest.mark.parametrize("name", OLD)
def test_version_2_only_appends_to_what_version_1_wrote(name):
    old = msgspec.msgpack.decode(bytes.fromhex(OLD[name])[4:])
    new = msgspec.msgpack.decode(bytes.fromhex(GOLDEN[name])[4:])
    assert new[: len(old)] == old


def test_every_message_type_has_a_golden_frame():
    assert {type(m) for m in BOTH.values()} == {*get_args(NodeMessage), *get_args(RouterMessage)}
    assert GOLDEN.keys() == BOTH.keys()


@pytest.mark.parametrize("name", NODE_SAYS)
def test_fields_that_a_newer_peer_appends_are_ignored(name):
    body = msgspec.msgpack.decode(encode(NODE_SAYS[name])[4:])
    frame = msgspec.msgpack.encode([*body, "a field of version 2", 17])
    framed = len(frame).to_bytes(4, "little") + frame
    assert router_side_reader().feed(framed) == [NODE_SAYS[name]]
