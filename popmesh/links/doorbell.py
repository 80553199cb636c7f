"""A socket beside the plan file: ring it and the shaper reads the plan again, then answers.

A signal would do the same but could not say when the new plan holds, nor that it was refused, and
a process id in a file may belong to somebody else by now. The answer is one JSON line.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from wire.errors import ConfigError, PeerError

ANSWER_TIMEOUT_S = 5.0
"""Reading a plan takes milliseconds; more is a shaper that is stuck or stopped. Guess."""

MAX_ANSWER_BYTES = 64 * 1024


class Answer(msgspec.Struct, frozen=True):
    """``problem``: why the plan was refused; empty when it holds now."""

    problem: str = ""


def doorbell_path(plan: Path) -> Path:
    """Where the shaper of ``plan`` listens."""
    return plan.with_name(plan.name + ".sock")


@asynccontextmanager
async def doorbell(plan: Path, reread: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``reread`` at every ring; what it raises as ``ConfigError`` is the answer.

    Raises ``ConfigError`` when another shaper answers for this plan.
    """

    async def on_ring(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        problem = ""
        try:
            reread()
        except ConfigError as exc:
            problem = str(exc)
        writer.write(msgspec.json.encode(Answer(problem)))
        writer.close()

    path = doorbell_path(plan)
    with _short(path) as name:
        if path.exists():
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(name) == 0:
                    raise ConfigError("another shaper runs this plan", where=str(plan))
            path.unlink()
        server = await asyncio.start_unix_server(on_ring, name)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def ring(plan: Path) -> None:
    """Make the shaper of ``plan`` read it again; returns when the new plan holds.

    Raises ``PeerError`` if no shaper answers, ``ConfigError`` with its words if it refuses.
    """
    try:
        with _short(doorbell_path(plan)) as name, socket.socket(socket.AF_UNIX) as link:
            link.settimeout(ANSWER_TIMEOUT_S)
            link.connect(name)
            raw = b""
            while (data := link.recv(4096)) and len(raw) < MAX_ANSWER_BYTES:
                raw += data
            answer = msgspec.json.decode(raw, type=Answer)
    except (OSError, msgspec.DecodeError) as exc:
        raise PeerError(f"no shaper answers for {plan}: {exc}") from exc
    if answer.problem:
        raise ConfigError(answer.problem)


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for a socket at ``path``: the system allows about 100 bytes, directories may be long.

    Source: unix(7), ``sun_path``; proc(5), ``/proc/self/fd``.
    """
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
