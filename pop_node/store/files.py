"""Durable files and locks: the few file system idioms that make a store crash-safe."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_SYNC_FILE_RANGE_WRITE = 2
"""From <fcntl.h>."""

LOCK_POLL_S = 0.05
"""Guess: nothing beside what locks with many seconds of work behind them are held for."""


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk (its directory entry is the caller's)."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def take_room(fd: int, nbytes: int) -> None:
    """Have the disk keep room for the first ``nbytes`` of an empty file; raises ``OSError``, which
    says how much is free where that is too little."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        disk = os.fstatvfs(fd)
        free = disk.f_bavail * disk.f_frsize / 1e9
        text = f"{exc.strerror}: {nbytes / 1e9:.2f} GB are needed, {free:.2f} GB are free"
        raise OSError(exc.errno, text) from exc


def begin_writing(fd: int, offset: int, nbytes: int) -> None:
    """Let the disk begin with what was written to a part of a file, so that the fsync at the end
    waits for little. It promises nothing: a system that cannot do so loses nothing but that.

    Source: sync_file_range(2), SYNC_FILE_RANGE_WRITE.
    """
    at, length = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
    _LIBC.sync_file_range(fd, at, length, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def read_at(path: Path, offset: int, limit: int) -> bytes:
    """At most ``limit`` bytes of a file from ``offset`` on; raises ``OSError``."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        pieces = []
        while limit and (piece := file.read(limit)):
            pieces.append(piece)
            limit -= len(piece)
        return b"".join(pieces)


def sync_directory(path: Path) -> None:
    """Wait until the directory's entries are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories_durably(*paths: Path) -> None:
    """Have these directories; they, and those above them that were missing, are on the disk then,
    whoever made them."""
    missing = {above for path in paths for above in path.parents if not above.exists()}
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    for parent in {each.parent for each in (*paths, *missing)}:
        sync_directory(parent)


def place_durably(path: Path, data: bytes, scratch: Path) -> None:
    """Give a file new content: after a crash it has the old one or the new one, whole.

    ``scratch`` is a directory of the caller's on the same file system.
    """
    temporary = scratch / path.name
    write_durably(temporary, data)
    temporary.rename(path)
    sync_directory(path.parent)


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (created when absent), against threads and processes.

    The kernel drops it when the holder dies. ``on_wait`` is called now and then while somebody else
    has it, and may raise to give up.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if on_wait is None:
            fcntl.flock(fd, fcntl.LOCK_EX)
        else:
            lock_patiently(fd, on_wait)
        yield
    finally:
        os.close(fd)


def lock_patiently(fd: int, on_wait: Callable[[], None]) -> None:
    """Lock an open file exclusively; ``on_wait`` as for ``locked``."""
    while not try_lock(fd):
        on_wait()
        time.sleep(LOCK_POLL_S)


def tree_bytes(path: Path) -> int:
    """Bytes in the files of a flat directory, 0 if it is gone."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(path))
    except FileNotFoundError:
        return 0


@contextmanager
def workspace(root: Path, guard: Path) -> Iterator[Path]:
    """A fresh directory below ``root``, removed at the end; leftovers of dead processes go first.

    The owner holds a lock on the directory itself, so an unlocked one is a leftover. ``guard`` is
    the lock under which directories are created and collected: none is collected before it is
    locked.
    """
    with locked(guard):
        _collect(root)
        path = root / uuid.uuid4().hex
        path.mkdir()
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def _collect(root: Path) -> None:
    for path in root.iterdir():
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if try_lock(fd):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)


def try_lock(fd: int) -> bool:
    """Lock an open file exclusively unless somebody else has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
