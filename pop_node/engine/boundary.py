"""The socket between agent and engine process: frames, codec, and the first message.

A frame is ``u32 little-endian length`` and a msgpack array ``[tag, *fields]`` of one message. The
socket is a Unix socket pair, so the peer is one of our own processes: a frame that does not decode
is a bug there, told as ``PeerError`` and never repaired. Imports neither torch nor msgspec.
"""

from __future__ import annotations

import array
import operator
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgpack  # type: ignore[import-untyped]

from pop_node.engine import messages
from pop_node.engine.config import EngineConfig
from pop_node.kv_stream.staging import StagingLayout
from wire.errors import ConfigError, PeerError

MAX_FRAME_BYTES = 16 * 1024 * 1024
"""Largest body: an ``Add`` of three million ids, beyond any context."""

RECEIVE_BYTES = 256 * 1024
"""Read size. Guess: more than a socket buffer holds by default."""

_LENGTH = struct.Struct("<I")

_pack = msgpack.Packer().pack
"""One for all threads, whose buffer of 256 KiB is not made for each message: it packs values of our
own types at one go, under the interpreter's lock."""

_TAGS: dict[int, type[Any]] = {
    1: messages.Add,
    2: messages.Drop,
    3: messages.StageFrom,
    4: messages.SlotFree,
    5: messages.Release,
    6: messages.Import,
    7: messages.Commit,
    8: messages.Stop,
    9: messages.Retarget,
    32: messages.Ready,
    33: messages.Allocated,
    34: messages.Declined,
    36: messages.StepDone,
    37: messages.PrefillDone,
    38: messages.Staged,
    39: messages.Imported,
    40: messages.Ended,
    41: messages.Crashed,
    42: messages.Beat,
}

Check = Callable[[Any], bool]


def _exactly(kind: type) -> Check:
    return lambda value: type(value) is kind


def _checker(hint: Any) -> Check:
    """A test for values of one field; covers the types that messages use."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: True
    if hint is float:
        return lambda value: type(value) in (float, int)
    if hint in (int, str, bytes):
        return _exactly(hint)
    if origin is Literal:
        return lambda value: value in args
    if origin is list:
        inner = _checker(args[0])
        return lambda value: type(value) is list and all(map(inner, value))
    if origin is tuple:
        parts = [_checker(arg) for arg in args]
        return lambda value: (
            type(value) is list
            and len(value) == len(parts)
            and all(part(item) for part, item in zip(parts, value, strict=True))
        )
    if origin is dict:
        key, inner = _checker(args[0]), _checker(args[1])
        return lambda value: (
            type(value) is dict and all(key(k) and inner(v) for k, v in value.items())
        )
    raise TypeError(f"no check for {hint}")


class _Shape:
    """How one message class is packed and checked."""

    def __init__(self, tag: int, cls: type[Any]) -> None:
        hints = get_type_hints(cls)
        self.tag = tag
        self.cls = cls
        self.names = tuple(field.name for field in fields(cls))
        self.get = operator.attrgetter(*self.names) if self.names else (lambda message: ())
        self.checks = tuple(_checker(hints[name]) for name in self.names)
        self.of_tuples = [
            index
            for index, name in enumerate(self.names)
            if get_origin(hints[name]) is list and get_origin(get_args(hints[name])[0]) is tuple
        ]

    def values(self, message: Any) -> tuple[Any, ...]:
        got = self.get(message)
        return got if len(self.names) != 1 else (got,)

    def build(self, values: list[Any]) -> Any:
        if len(values) != len(self.checks):
            raise _malformed(f"{self.cls.__name__} with {len(values)} fields")
        for name, check, value in zip(self.names, self.checks, values, strict=True):
            if not check(value):
                raise _malformed(f"{self.cls.__name__}.{name} holds a {type(value).__name__}")
        for index in self.of_tuples:
            values[index] = [tuple(item) for item in values[index]]
        return self.cls(*values)


_BY_TAG = {tag: _Shape(tag, cls) for tag, cls in _TAGS.items()}
_BY_CLASS = {shape.cls: shape for shape in _BY_TAG.values()}


def encode(message: messages.AgentMessage | messages.EngineMessage | messages.Beat) -> bytes:
    """One frame. Raises ``ValueError`` for a message beyond ``MAX_FRAME_BYTES``."""
    shape = _BY_CLASS[type(message)]
    return _frame((shape.tag, *shape.values(message)))


class MessageReader:
    """Turns received bytes into messages, in order."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Messages completed by ``data``.

        Raises ``PeerError`` (``protocol_error``) for an oversized frame, an unknown tag, a missing
        field or one of the wrong type.
        """
        rest = self._rest
        rest += data
        out: list[Any] = []
        at = 0
        while len(rest) - at >= 4:
            size = _LENGTH.unpack_from(rest, at)[0]
            if size > MAX_FRAME_BYTES:
                raise _malformed(f"a frame of {size} bytes")
            if len(rest) - at - 4 < size:
                break
            out.append(_decode(bytes(rest[at + 4 : at + 4 + size])))
            at += 4 + size
        del rest[:at]
        return out


def _decode(body: bytes) -> Any:
    values = _unpack(body)
    if type(values) is not list or not values or type(values[0]) is not int:
        raise _malformed("a body that is no tagged array")
    shape = _BY_TAG.get(values[0])
    if shape is None:
        raise _malformed(f"unknown tag {values[0]}")
    return shape.build(values[1:])


def _unpack(body: bytes) -> Any:
    try:
        return msgpack.unpackb(body)
    except (msgpack.UnpackException, ValueError, TypeError) as exc:
        raise _malformed(f"undecodable body: {exc}") from exc


def _frame(value: Any) -> bytes:
    body: bytes = _pack(value)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


def _malformed(message: str) -> PeerError:
    return PeerError(f"engine boundary: {message}", code="protocol_error", retryable=False)


# ---- set-up ------------------------------------------------------------------------------------


def send_setup(sock: socket.socket, config: EngineConfig, layout: StagingLayout, fd: int) -> None:
    """First frame to a new engine: its configuration, and the staging memory's descriptor.

    A few hundred bytes on an empty socket, so it does not block.
    """
    plain = asdict(config) | {"model_dir": os.fspath(config.model_dir)}
    sock.sendmsg(
        [_frame([plain, asdict(layout)])],
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))],
    )


def receive_setup(sock: socket.socket) -> tuple[EngineConfig, StagingLayout, int]:
    """Counterpart of ``send_setup`` on a blocking socket; the caller owns the descriptor.

    Raises ``PeerError`` when the agent is gone or says something else.
    """
    head, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, 1)
    if len(head) != _LENGTH.size or len(fds) != 1:
        raise _malformed("no set-up with a staging descriptor")
    size = _LENGTH.unpack(head)[0]
    body = b""
    while len(body) < size:
        data = sock.recv(size - len(body))
        if not data:
            raise _malformed("the agent left during the set-up")
        body += data
    try:
        plain, layout = _unpack(body)
        config = EngineConfig(**plain | {"model_dir": Path(plain["model_dir"])})
        return config, StagingLayout(**layout), fds[0]
    except (TypeError, ValueError, KeyError, ConfigError) as exc:
        raise _malformed(f"unusable set-up: {exc}") from exc
