"""Frames as they go over the wire, byte for byte, and as versions 1 to 3 wrote them.

Versions understand each other: what an older one wrote is read, and what it does not know is only
appended.
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

GOLDEN, V3, V2, V1 = ALL = [
    json.loads((Path(__file__).parent / "golden" / f"frames-v{version}.json").read_text())
    for version in (4, 3, 2, 1)
]
BOTH = NODE_SAYS | ROUTER_SAYS
FRAMES = [(name, golden[name]) for golden in ALL for name in golden]
STEPS = [(new, old, name) for new, old in ((GOLDEN, V3), (V3, V2), (V2, V1)) for name in old]


@pytest.mark.parametrize("name", BOTH)
def test_a_message_is_written_as_it_always_was(name):
    assert encode(BOTH[name]).hex() == GOLDEN[name], "the wire has changed: raise MAX_VERSION"


@pytest.mark.parametrize(("name", "frame"), [f for f in FRAMES if f[0] in NODE_SAYS])
def test_a_node_of_any_version_is_understood(name, frame):
    assert router_side_reader().feed(bytes.fromhex(frame)) == [NODE_SAYS[name]]


@pytest.mark.parametrize(
    ("name", "frame"), [f for f in FRAMES if f[0] in ROUTER_SAYS and f[0] != "part"]
)
def test_a_router_of_any_version_is_understood(name, frame):
    assert node_side_reader().feed(bytes.fromhex(frame)) == [ROUTER_SAYS[name]]


@pytest.mark.parametrize(("new", "old", "name"), STEPS, ids=[name for *_, name in STEPS])
def test_a_version_only_appends_to_what_the_one_before_wrote(new, old, name):
    written, before = (msgspec.msgpack.decode(bytes.fromhex(v[name])[4:]) for v in (new, old))
    assert cut_like(before, written) == before


def cut_like(old, new):
    """``new`` without what was appended to it, or to an array within it, after ``old``."""
    if isinstance(old, list) and isinstance(new, list):
        return [cut_like(*both) for both in zip(old, new, strict=False)]
    return new


def test_every_message_type_has_a_golden_frame():
    assert {type(m) for m in BOTH.values()} == {*get_args(NodeMessage), *get_args(RouterMessage)}
    assert GOLDEN.keys() == BOTH.keys()


@pytest.mark.parametrize("name", NODE_SAYS)
def test_fields_that_a_newer_peer_appends_are_ignored(name):
    body = msgspec.msgpack.decode(encode(NODE_SAYS[name])[4:])
    frame = msgspec.msgpack.encode([*body, "a field of a later version", 17])
    framed = len(frame).to_bytes(4, "little") + frame
    assert router_side_reader().feed(framed) == [NODE_SAYS[name]]
