"""A bundle that is still arriving: chunks in any order, from anywhere, across deaths.

    ROOT/partial/BUNDLE/   the bundle's future directory, under an exclusive lock while it is filled

What is there needs no record of its own: every chunk carries its digest in the manifest, so whoever
goes on hashes what the file holds and knows what is missing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from pop_node.store.files import sync_directory, try_lock, write_durably
from pop_node.store.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    encode_manifest,
)
from pop_node.store.source import Progress
from pop_node.store.tensor_file import chunk_digests, write_all


class Partial:
    """An unfinished bundle that this process fills. ``put_chunk`` may be called from any thread."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._fd = os.open(path / manifest.data.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._empty = os.fstat(self._fd).st_size == 0
        try:
            if manifest.data.nbytes:  # a disk that is too full says so before anything travels
                os.posix_fallocate(self._fd, 0, manifest.data.nbytes)
            os.ftruncate(self._fd, manifest.data.nbytes)
        except OSError:
            os.close(self._fd)
            raise

    def missing_chunks(self, progress: Progress) -> list[int]:
        """Chunks that are not there yet or damaged; reads all that is. Phase ``resume``."""
        data = self.manifest.data
        if self._empty:
            return list(range(len(data.chunks)))
        missing = []
        digests = chunk_digests(self.path / data.name, data.nbytes, data.chunk_bytes)
        for index, digest in enumerate(digests):
            if digest != data.chunks[index]:
                missing.append(index)
            offset, nbytes = data.span(index)
            progress("resume", offset + nbytes, data.nbytes)
        return missing

    def missing_texts(self) -> list[FileEntry]:
        """Text files that are not there yet or damaged."""
        return [entry for entry in self.manifest.files if not self._has(entry)]

    def put_chunk(self, index: int, data: bytes | memoryview) -> bool:
        """Write a chunk from wherever; False if it is not the one that the manifest names."""
        if blake3(data).hexdigest() != self.manifest.data.chunks[index]:
            return False
        write_all(self._fd, data, self.manifest.data.span(index)[0])
        return True

    def put_text(self, entry: FileEntry, text: bytes) -> bool:
        """Write a text file; False if it is not the one that the manifest names."""
        if blake3(text).hexdigest() != entry.blake3:
            return False
        write_durably(self.path / entry.name, text)
        return True

    def finish(self) -> None:
        """Wait until everything is on the disk: the directory may be published."""
        os.fsync(self._fd)
        write_durably(self.path / MANIFEST_FILE, encode_manifest(self.manifest))
        sync_directory(self.path)

    def close(self) -> None:
        """What is there stays for the next attempt, or is published."""
        os.close(self._fd)

    def _has(self, entry: FileEntry) -> bool:
        try:
            return blake3((self.path / entry.name).read_bytes()).hexdigest() == entry.blake3
        except FileNotFoundError:
            return False


@contextmanager
def partial_bundle(
    root: Path, manifest: Manifest, on_wait: Callable[[], None]
) -> Iterator[Partial]:
    """The partial bundle of ``manifest`` below ``root``, for this process alone.

    Waits while another process fills it. Raises ``OSError``.
    """
    path = root / manifest.bundle
    fd = _locked_directory(path, on_wait)
    try:
        partial = Partial(path, manifest)
        try:
            yield partial
        finally:
            partial.close()
    finally:
        os.close(fd)


def _locked_directory(path: Path, on_wait: Callable[[], None]) -> int:
    """Its file descriptor. The directory may be published or collected while one waits for it."""
    while True:
        path.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if not try_lock(fd):
                    on_wait()
                    fcntl.flock(fd, fcntl.LOCK_EX)
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    fd, locked = -1, fd
                    return locked
            finally:
                if fd >= 0:
                    os.close(fd)


def abandoned_partials(root: Path) -> Iterator[Path]:
    """Partial bundles that no process fills; none can begin to while one looks at them."""
    for path in list(root.iterdir()) if root.is_dir() else ():
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if try_lock(fd):
                yield path
        finally:
            os.close(fd)
