"""A bundle that is still arriving: chunks in any order, from anywhere, across deaths.

    ROOT/partial/BUNDLE/   the bundle's future directory, under an exclusive lock while it is filled

What is there needs no record that could be wrong: every chunk carries its digest in the manifest,
so whoever goes on hashes what the file holds and knows what is missing. Meanwhile others may read
what has arrived (``pop_node.store.arrivals``): the manifest is there from the beginning.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from pop_node.store.arrivals import CHECKED, REFUSED, Marks
from pop_node.store.bundle import check_claims, check_model, check_tensor, open_image
from pop_node.store.files import (
    begin_writing,
    lock_patiently,
    sync_directory,
    take_room,
    try_lock,
    write_durably,
)
from pop_node.store.holding import claimed
from pop_node.store.layout import TensorEntry
from pop_node.store.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    encode_manifest,
    read_manifest,
)
from pop_node.store.source import Progress
from pop_node.store.tensor_file import chunk_digests, write_all
from wire.errors import ConfigError

CHECK_S = 0.2
"""Between two looks for tensors that have become whole. Guess: hashing what arrives on 1 Gbit/s in
it takes a tenth of it."""


class Partial:
    """An unfinished bundle that this process fills. ``put_chunk`` may be called from any thread."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._missing: set[int] | None = None
        self._checked: set[str] = set()  # tensors
        self._fd = os.open(path / manifest.data.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._empty = os.fstat(self._fd).st_size == 0
        try:
            if manifest.data.nbytes:  # a disk that is too full says so before anything travels
                take_room(self._fd, manifest.data.nbytes)
            os.ftruncate(self._fd, manifest.data.nbytes)
            self._marks = Marks(path, len(manifest.data.chunks))
        except OSError:
            os.close(self._fd)
            raise
        try:
            self._place_manifest()
        except OSError:
            self.close()
            raise

    def missing_chunks(self, progress: Progress) -> list[int]:
        """Chunks that are not there yet or damaged, in order.

        The first call reads all that is there: phase ``resume``.
        """
        if self._missing is None:
            self._missing = set(self._look(progress))
        return sorted(self._missing)

    def _look(self, progress: Progress) -> Iterator[int]:
        data = self.manifest.data
        if self._empty:
            yield from range(len(data.chunks))
            return
        digests = chunk_digests(self.path / data.name, data.spans())
        for index, digest in enumerate(digests):
            if digest == data.chunks[index]:
                self._marks.mark(index)
            else:
                yield index
            offset, nbytes = data.span(index)
            progress("resume", offset + nbytes, data.nbytes)

    def missing_texts(self) -> list[FileEntry]:
        """Text files that are not there yet or damaged."""
        return [entry for entry in self.manifest.files if not self._has(entry)]

    def put_chunk(self, index: int, data: bytes | memoryview) -> bool:
        """Write a chunk from wherever; False if it is not the one that the manifest names."""
        if blake3(data).hexdigest() != self.manifest.data.chunks[index]:
            return False
        offset = self.manifest.data.span(index)[0]
        write_all(self._fd, data, offset)
        self._marks.mark(index)
        begin_writing(self._fd, offset, len(data))
        if self._missing is not None:
            self._missing.discard(index)
        return True

    def put_text(self, entry: FileEntry, text: bytes) -> bool:
        """Write a text file; False if it is not the one that the manifest names."""
        if blake3(text).hexdigest() != entry.blake3:
            return False
        write_durably(self.path / entry.name, text)
        return True

    def check_claims(self) -> None:
        """With all text files there: its tensors as named make the identity as named.

        Raises ``ConfigError`` if not; who loads what has arrived hears of it.
        """
        try:
            check_claims(self.path, self.manifest)
        except ConfigError:
            self._marks.judge(REFUSED)
            raise

    def check(self, progress: Progress) -> None:
        """With everything there: it is the model that it claims to be; phase ``verify``.

        Its chunks were checked when they arrived or were looked at, and most tensors meanwhile.
        Raises ``ConfigError`` if not; who loads what has arrived hears either.
        """
        try:
            check_model(self.path, self.manifest, progress, self._checked)
        except ConfigError:
            self._marks.judge(REFUSED)
            raise
        self._marks.judge(CHECKED)

    @contextmanager
    def checking_ahead(self) -> Iterator[None]:
        """Meanwhile tensors are checked as soon as all their chunks are there, in a thread: after
        the last chunk little is left for ``check``, and who loads the bundle need not wait."""
        stop = threading.Event()
        thread = threading.Thread(target=self._check_ahead, args=(stop,), name="check")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _check_ahead(self, stop: threading.Event) -> None:
        """What is wrong is left for ``check`` to find again and say."""
        left = list(self.manifest.tensors)
        with suppress(ConfigError), open_image(self.path, self.manifest) as image:
            while left and not stop.wait(CHECK_S):
                here, left = left, []
                for entry in here:
                    if stop.is_set() or not self._is_here(entry):
                        left.append(entry)
                        continue
                    check_tensor(image, self.manifest, entry)
                    self._checked.add(entry.name)

    def _is_here(self, entry: TensorEntry) -> bool:
        chunk_bytes, missing = self.manifest.data.chunk_bytes, self._missing
        first = entry.offset // chunk_bytes
        stop = -(-(entry.offset + entry.nbytes) // chunk_bytes)
        return missing is not None and not any(index in missing for index in range(first, stop))

    def finish(self) -> None:
        """Wait until everything is on the disk: the directory may be published."""
        os.fsync(self._fd)
        self._marks.remove()
        sync_directory(self.path)

    def close(self) -> None:
        """What is there stays for the next attempt, or is published."""
        self._marks.close()
        os.close(self._fd)

    def _place_manifest(self) -> None:
        """Durably and by one rename: a reader finds none or all of it."""
        with suppress(ConfigError):  # an earlier attempt's; whose name it carries matters to nobody
            if read_manifest(self.path).bundle == self.manifest.bundle:
                return
        temporary = self.path / f".{MANIFEST_FILE}"
        write_durably(temporary, encode_manifest(self.manifest))
        temporary.rename(self.path / MANIFEST_FILE)

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

    Waits while another process fills it, ``on_wait`` as for ``files.locked``. Raises ``OSError``.
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
                lock_patiently(fd, on_wait)
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    fd, locked = -1, fd
                    return locked
            finally:
                if fd >= 0:
                    os.close(fd)


def abandoned_partials(root: Path) -> Iterator[Path]:
    """Partial bundles that no process fills or reads; none can begin to while one looks at them."""
    for path in list(root.iterdir()) if root.is_dir() else ():
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with claimed(path) as unread:
                if unread and try_lock(fd):
                    yield path
        finally:
            os.close(fd)


def is_partial(path: Path) -> bool:
    """Whether a bundle's directory is, or was, one that is being filled."""
    return path.parent.name == "partial"


def published_as(path: Path) -> Path | None:
    """Where a partial bundle that was at ``path`` is since it is complete; None if it is not."""
    published = path.parent.parent / "bundles" / path.name
    was_partial = is_partial(path) and not path.exists()
    return published if was_partial and published.is_dir() else None
