"""Shared by the tests of this folder: a tiny model, an empty store, disks that break or fill."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pop_node.store import layout
from pop_node.store.source import unwatched
from pop_node.store.store import Bundle, Store
from tests.pop_node.store.tiny_models import write_huggingface


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny model as a Hugging Face directory."""
    return write_huggingface(tmp_path / "source")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store without a model."""
    return Store(tmp_path / "store")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A tiny model of many chunks."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4096)
    store = Store(tmp_path / "store")
    store.add(str(write_huggingface(tmp_path / "source")), "tiny", "float32", unwatched)
    return store.get("tiny")


class Fault(OSError):
    """The disk that broke."""


@pytest.fixture
def failing_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """``[n]``: the n-th fsync or rename from now on fails, and all after it; ``[0]``: none."""
    countdown = [0]

    def strike() -> None:
        if countdown[0]:
            countdown[0] -= 1
            if countdown[0] == 0:
                countdown[0] = 1
                raise Fault("disk failed")

    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(fd: int) -> None:
        strike()
        real_fsync(fd)

    def rename(self: Path, target: Path) -> Path:
        strike()
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    yield countdown
    countdown[0] = 0


@pytest.fixture
def filling_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """``[n]``: from the n-th change on the disk is full; ``[0]``: it has room."""
    countdown = [0]

    def full() -> None:
        if countdown[0] == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        if countdown[0]:
            countdown[0] -= 1

    for owner, name in ((os, "pwrite"), (os, "posix_fallocate"), (os, "fsync"), (Path, "mkdir")):
        real = getattr(owner, name)

        def fails(*arguments: object, real: object = real, **named: object) -> object:
            full()
            return real(*arguments, **named)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, fails)
    yield countdown
    countdown[0] = 0
