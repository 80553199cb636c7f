"""In use or not: a shared lock on a bundle's manifest, held by whoever loads, serves or checks it.

The kernel drops it when the holder dies, so there is nothing to clean up and nothing to trust.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pop_node.store.files import try_lock
from pop_node.store.manifest import MANIFEST_FILE
from wire.errors import ConfigError

CLAIM_WAIT_S, CLAIM_WAITS = 0.002, 100
"""Whoever only looks whether a bundle is in use claims it for a moment, some microseconds; whoever
removes it, for a rename. Guess: far more than either takes."""


class Hold:
    """Keeps a bundle from being collected or removed until ``close`` or the end of the process."""

    def __init__(self, bundle: Path) -> None:
        """Raises ``ConfigError`` if the bundle is gone, just being removed, or cannot be read."""
        self.bundle = bundle
        path = bundle / MANIFEST_FILE
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
        try:
            _share(self._fd)
            gone = os.stat(path).st_ino != os.fstat(self._fd).st_ino
        except (BlockingIOError, FileNotFoundError):
            gone = True
        except OSError as exc:
            os.close(self._fd)
            raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
        if gone:
            os.close(self._fd)
            raise ConfigError("the bundle is being removed", where=str(bundle))

    def close(self) -> None:
        """No longer in use."""
        os.close(self._fd)


def _share(fd: int) -> None:
    """Raises ``BlockingIOError`` if somebody has it for himself and does not let it go."""
    for _ in range(CLAIM_WAITS):
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        time.sleep(CLAIM_WAIT_S)
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextmanager
def claimed(bundle: Path) -> Iterator[bool]:
    """Whether nobody holds the bundle; if so, nobody can until the end."""
    try:
        fd = os.open(bundle / MANIFEST_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        yield try_lock(fd)
    finally:
        os.close(fd)


def mark_used(bundle: Path) -> None:
    """Now is when it was last used. A store that is read-only to us keeps no such record."""
    with suppress(OSError):
        os.utime(bundle / MANIFEST_FILE)


def last_used_ns(bundle: Path) -> int:
    """When it was added or last loaded, in ns since 1970; 0 if its manifest is gone."""
    try:
        return os.stat(bundle / MANIFEST_FILE).st_mtime_ns
    except FileNotFoundError:
        return 0
