"""Reads past the page cache: as fast as the drive, and nothing else is pushed out of memory."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from pop_node.store.layout import ALIGNMENT
from wire.errors import ConfigError


class DirectFile:
    """A file open for reading; ``direct`` is false if not asked for or refused.

    ``read`` may be called from several threads at once.
    """

    def __init__(self, path: Path, direct: bool = True) -> None:
        """Raises ``ConfigError`` if the file cannot be opened."""
        self._path = path
        try:
            self._fd, self.direct = _open(path) if direct else (_open_cached(path), False)
        except OSError as exc:
            raise ConfigError(f"cannot be opened: {exc}", where=str(path)) from exc

    def read(self, view: memoryview, offset: int) -> None:
        """Fill ``view``. Its address and length and ``offset`` are multiples of ``ALIGNMENT``.

        Raises ``ConfigError`` if the drive fails or the file ends before.
        """
        try:
            while view:
                read = os.preadv(self._fd, [view], offset)
                if read == 0 or (self.direct and read % ALIGNMENT):
                    raise ConfigError(f"is cut short after {offset + read} bytes", where=self.where)
                view, offset = view[read:], offset + read
        except OSError as exc:
            raise ConfigError(f"cannot be read at {offset}: {exc}", where=self.where) from exc

    @property
    def where(self) -> str:
        """The file's name for messages."""
        return str(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)


def _open(path: Path) -> tuple[int, bool]:
    """(file descriptor, whether reads are direct). Some file systems refuse only the first read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return _open_cached(path), False
    try:
        with mmap.mmap(-1, ALIGNMENT) as page:
            os.preadv(fd, [page], 0)
    except OSError as exc:
        os.close(fd)
        if exc.errno != errno.EINVAL:
            raise
        return _open_cached(path), False
    return fd, True


def _open_cached(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
