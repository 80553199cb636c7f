"""Which chunks of a partial bundle are there: written by who fills it, read by who loads it.

    ROOT/partial/BUNDLE/.arrived   a byte per chunk, then one for the bundle as a whole

A chunk's byte becomes 1 after the chunk was written and matched its digest; the last byte becomes
CHECKED once the tensors are the ones that the model's identity names. The writer of one life sets
all back to 0 before it looks at what an earlier one left. Bytes are read with ``pread``: processes
share them through the page cache, and no crash of one can hurt another.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, Self, TypeVar

from pop_node.store.files import try_lock
from pop_node.store.manifest import Manifest
from wire.errors import ConfigError

ARRIVED_FILE = ".arrived"
"""No file of a bundle can have this name: those begin with a letter or digit."""

OPEN, CHECKED, REFUSED = 0, 1, 2
"""The last byte: not known yet, the model it claims to be, another one."""

PATIENCE_S = 60.0
"""Guess: longest without anything new before a load gives up; peers are left after 5 s, and an
origin is asked for 8 s after its last failure."""

ORPHAN_S = 2.0
"""Without anything new for so long, a look whether anybody fills the bundle at all. Guess."""

POLL_S = 0.01
"""Guess: nothing beside the time a chunk takes to arrive, and 100 small reads a second."""


class Numbered(Protocol):
    """Anything about one chunk."""

    @property
    def index(self) -> int:
        """The chunk's number in the data file."""


N = TypeVar("N", bound=Numbered)


class Marks:
    """The writer's side. ``mark`` may be called from several threads."""

    def __init__(self, directory: Path, num_chunks: int) -> None:
        """All marks are unset. Raises ``OSError``."""
        self._path = directory / ARRIVED_FILE
        self._num_chunks = num_chunks
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(self._fd, bytes(num_chunks + 1), 0)
        except OSError:
            os.close(self._fd)
            raise

    def mark(self, index: int) -> None:
        """The chunk is there and right."""
        os.pwrite(self._fd, b"\x01", index)

    def judge(self, verdict: int) -> None:
        """``CHECKED`` or ``REFUSED``."""
        os.pwrite(self._fd, bytes([verdict]), self._num_chunks)

    def remove(self) -> None:
        """The bundle is complete; who reads now goes on reading."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """The marks stay for who reads them."""
        os.close(self._fd)


class Arrivals:
    """The reader's side, a context manager."""

    def __init__(self, fd: int, num_chunks: int, directory: Path) -> None:
        self._fd = fd
        self._num_chunks = num_chunks
        self._directory = directory
        self._where = str(directory)

    @classmethod
    def of(cls, directory: Path, manifest: Manifest) -> Self | None:
        """None for a bundle that is complete; raises ``ConfigError`` if it cannot be read."""
        path = directory / ARRIVED_FILE
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
        return cls(fd, len(manifest.data.chunks), directory)

    def marks(self) -> bytes:
        """[chunks] 0 or 1; raises ``ConfigError``."""
        return self._read()[:-1]

    def as_they_come(
        self, chunks: Iterable[N], stop: threading.Event, patience_s: float = PATIENCE_S
    ) -> Iterator[N]:
        """``chunks``, those first that are there; ends early when ``stop`` is set.

        Raises ``ConfigError`` after ``patience_s`` without anything new, or when nobody fills the
        bundle any more.
        """
        waiting = {chunk.index: chunk for chunk in chunks}
        hope = _Hope(self._directory, patience_s)
        while waiting and not stop.is_set():
            hope.renew()
            marks = self.marks()
            here = [index for index in waiting if marks[index]]
            for index in here:
                yield waiting.pop(index)
            if waiting and not here:
                hope.check(marks)
                stop.wait(POLL_S)

    def wait_checked(self, patience_s: float = PATIENCE_S) -> None:
        """Return when the model was found to be the one its manifest names.

        Raises ``ConfigError`` if it was not, or nobody says so any more as in ``as_they_come``.
        """
        hope = _Hope(self._directory, patience_s)
        while True:
            hope.renew()
            marks = self._read()
            if marks[-1] == CHECKED:
                return
            if marks[-1] == REFUSED:
                raise ConfigError("the model is not the one its manifest names", where=self._where)
            hope.check(marks)
            time.sleep(POLL_S)

    def close(self) -> None:
        """Nothing more will be read."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self) -> bytes:
        try:
            marks = os.pread(self._fd, self._num_chunks + 1, 0)
        except OSError as exc:
            raise ConfigError(f"cannot be read: {exc}", where=self._where) from exc
        if len(marks) != self._num_chunks + 1:
            raise ConfigError("does not say what has arrived", where=self._where)
        return marks


class _Hope:
    """How long to wait for more: ``renew``, read the marks, ``check`` them. Who fills the bundle
    sets its last mark before letting it go, so marks read after a look at him are the last ones."""

    def __init__(self, directory: Path, patience_s: float) -> None:
        self._directory = directory
        self._patience_s = patience_s
        self._seen = b""
        self._since = time.monotonic()
        self._is_filled = True

    def renew(self) -> None:
        """Look whether somebody fills it, if nothing was new for a while."""
        if time.monotonic() - self._since > ORPHAN_S:
            self._is_filled = is_filled(self._directory)

    def check(self, marks: bytes) -> None:
        """Raises ``ConfigError`` if there is no hope that these will become more."""
        now = time.monotonic()
        if marks != self._seen:
            self._seen, self._since, self._is_filled = marks, now, True
        elif not self._is_filled or now - self._since > self._patience_s:
            raise ConfigError(
                f"nothing of the bundle has arrived for {now - self._since:.0f} s",
                where=str(self._directory),
                suggestion="what is there is kept: the fetch goes on from there",
            )


def is_filled(path: Path) -> bool:
    """Whether some process fills this partial bundle at the moment."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not try_lock(fd)
    finally:
        os.close(fd)
