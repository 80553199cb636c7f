"""A node that starts anew as a whole: between its old process and the new one, pages are dropped.

An agent that has drained becomes this program, which drops the pages and becomes the agent's own
command again. All under one process id, so whoever keeps the node running sees nothing end. The new
agent finds what happened before it (``Reborn``) in its environment.

``python -m pop_node.drills.rebirth`` reads a ``Rebirth`` as JSON from its standard input.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import MutableMapping
from pathlib import Path

import msgspec

from pop_node.drills.libraries import library_files
from pop_node.drills.pages import Dropped, drop_pages
from pop_node.drills.report import Cold

log = logging.getLogger(__name__)

REBORN = "POPMESH_REBORN"
"""Environment variable that carries ``Reborn`` over."""


class Rebirth(msgspec.Struct):
    """What is to be done. ``began_at`` on the monotonic clock, which processes share."""

    number: int
    model: str
    bundle: str
    bundle_bytes: int
    files: list[str]
    libraries: bool
    command: list[str]
    began_at: float

    def become(self) -> None:
        """Be the program that carries it out; does not return."""
        with tempfile.TemporaryFile() as told:
            told.write(msgspec.json.encode(self))
            told.seek(0)
            os.dup2(told.fileno(), 0)
        os.execv(sys.executable, [sys.executable, "-m", "pop_node.drills.rebirth"])


class Reborn(msgspec.Struct):
    """What was done. ``problem``: why the start that follows is not cold."""

    number: int
    model: str
    bundle: str
    bundle_bytes: int
    cold: Cold
    problem: str
    down_s: float
    drop_s: float
    started_at: float


def take_reborn(environment: MutableMapping[str, str]) -> Reborn | None:
    """What is told of the process before this one; told once, our children have not been reborn."""
    told = environment.pop(REBORN, None)
    if told is None:
        return None
    try:
        return msgspec.json.decode(told, type=Reborn)
    except msgspec.DecodeError as exc:
        log.error("what was told of the process before this one is not understood: %s", exc)
        return None


def make_cold(model: list[Path], libraries: list[Path]) -> Cold:
    """Drop the pages, the model's last."""
    cold_libraries = drop_pages(libraries) if libraries else None
    return cold_of(drop_pages(model), cold_libraries)


def cold_of(model: Dropped | None, libraries: Dropped | None) -> Cold:
    """Both in one."""
    return Cold(
        model_pages=model.pages if model else 0,
        model_pages_resident=model.resident if model else 0,
        library_pages=libraries.pages if libraries else 0,
        library_pages_resident=libraries.resident if libraries else 0,
        model=model,
        libraries=libraries,
    )


def main() -> None:
    """Drop, tell, and be the agent again."""
    told = msgspec.json.decode(sys.stdin.buffer.read(), type=Rebirth)
    down_at = time.monotonic()
    problem = ""
    cold = cold_of(None, None)
    try:
        cold = make_cold([Path(file) for file in told.files], _libraries(told))
        problem = cold.model.why() if cold.model is not None else ""
    except OSError as exc:
        problem = f"pages cannot be dropped: {exc}"
    started_at = time.monotonic()
    reborn = Reborn(
        number=told.number,
        model=told.model,
        bundle=told.bundle,
        bundle_bytes=told.bundle_bytes,
        cold=cold,
        problem=problem,
        down_s=down_at - told.began_at,
        drop_s=started_at - down_at,
        started_at=started_at,
    )
    os.environ[REBORN] = msgspec.json.encode(reborn).decode()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.execv(sys.executable, told.command)


def _libraries(told: Rebirth) -> list[Path]:
    return library_files() if told.libraries else []


if __name__ == "__main__":
    main()
