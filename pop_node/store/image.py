"""The image of a data file, whether its chunks are packed or not: one chunk, or any range.

For checking and packing, which may take their time; engines load through
``pop_node.store.loader``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from pop_node.store.manifest import DataFile
from wire.errors import ConfigError

KEPT_BYTES = 64 * 1024 * 1024
"""Of decoded chunks: the stripes of a matrix lie in several, and its rows are read from all."""


class UndecodableError(ConfigError):
    """What is stored of a chunk is no block of it."""


def decode_chunk(stored: memoryview, out: memoryview, index: int, where: str) -> None:
    """Decode a packed chunk, block by block; ``out`` is as long as it is in the image.

    Raises ``UndecodableError`` naming the chunk; ``out`` may then hold anything.
    """
    from kernels.codec import decode_run  # only for packed models

    with undecodable(index, where):
        decode_run(stored, out)


@contextmanager
def undecodable(index: int, where: str) -> Iterator[None]:
    """Turns ``CodecError`` into an ``UndecodableError`` that names the chunk."""
    from kernels.codec.layout import CodecError

    try:
        yield
    except CodecError as exc:
        raise UndecodableError(f"chunk {index} cannot be decoded: {exc}", where=where) from exc


class ImageFile:
    """A data file open for reading its image, a context manager; for one thread."""

    def __init__(self, path: Path, data: DataFile) -> None:
        """Raises ``OSError``."""
        self.path = path
        self._data = data
        self._kept: dict[int, memoryview] = {}
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the image from ``offset`` on.

        Raises ``OSError`` if it cannot be read, ``UndecodableError``.
        """
        if self._data.packing is None:
            read_all(self._fd, view, offset)
            return
        while view:
            index, within = divmod(offset, self._data.chunk_bytes)
            part = self._chunk(index)[within : within + len(view)]
            if not part:
                raise OSError(f"ends at byte {offset}")
            view[: len(part)] = part
            view, offset = view[len(part) :], offset + len(part)

    def _chunk(self, index: int) -> memoryview:
        chunk = self._kept.pop(index, None)
        if chunk is None:
            if (len(self._kept) + 1) * self._data.chunk_bytes > KEPT_BYTES and self._kept:
                del self._kept[next(iter(self._kept))]
            chunk = unpacked(self.path, self._data, index, self.read_stored(index))
        self._kept[index] = chunk  # as the last one used
        return chunk

    def read_stored(self, index: int) -> memoryview:
        """A chunk as it lies in the file; raises ``OSError``."""
        offset, nbytes = self._data.span(index)
        stored = memoryview(bytearray(nbytes))
        read_all(self._fd, stored, offset)
        return stored

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)


def unpacked(path: Path, data: DataFile, index: int, stored: memoryview) -> memoryview:
    """A chunk as it is in the image; raises ``UndecodableError``."""
    nbytes = data.decoded_span(index)[1]
    if len(stored) == nbytes:
        return stored
    out = memoryview(bytearray(nbytes))
    decode_chunk(stored, out, index, str(path))
    return out


def read_all(fd: int, view: memoryview, offset: int) -> None:
    """``preadv`` until ``view`` is full; raises ``OSError``, also where the file ends before."""
    while view:
        read = os.preadv(fd, [view], offset)
        if not read:
            raise OSError(f"ends at byte {offset}")
        view, offset = view[read:], offset + read
