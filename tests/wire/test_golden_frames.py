"""Frames as they went over the wire of version 1, byte for byte: an old peer must read the new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from tests.wire.wire_samples import NODE_SAYS, ROUTER_SAYS
from wire.framing import encode, node_side_reader, router_side_reader
from wire.messages import NodeMessage, RouterMessage

GOLDEN = json.loads((Path(__file__).parent / "golden" / "frames-v1.json").read_text())
BOTH = NODE_SAYS | ROUTER_SAYS


@pytest.mark.parametrize("name", BOTH)
def test_a_message_is_written_as_it_always_was(name):
    assert encode(BOTH[name]).hex() == GOLDEN[name], "the wire has changed: raise MAX_VERSION"


@pytest.mark.parametrize("name", NODE_SAYS)
def test_a_node_of_version_1_is_understood(name):
    assert router_side_reader().feed(bytes.fromhex(GOLDEN[name])) == [NODE_SAYS[name]]


@pytest.mark.parametrize("name", [name for name in ROUTER_SAYS if name != "part"])
def test_a_router_of_version_1_is_understood(name):
    assert node_side_reader().feed(bytes.fromhex(GOLDEN[name])) == [ROUTER_SAYS[name]]


def test_every_message_type_has_a_golden_frame():
    assert {type(m) for m in BOTH.values()} == {*get_args(NodeMessage), *get_args(RouterMessage)}
    assert GOLDEN.keys() == BOTH.keys()


@pytest.mark.parametrize("name", NODE_SAYS)
def test_fields_that_a_newer_peer_appends_are_ignored(name):
    body = msgspec.msgpack.decode(encode(NODE_SAYS[name])[4:])
    frame = msgspec.msgpack.encode([*body, "a field of version 2", 17])
    framed = len(frame).to_bytes(4, "little") + frame
    assert router_side_reader().feed(framed) == [NODE_SAYS[name]]
