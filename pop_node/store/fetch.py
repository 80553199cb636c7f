"""Fills a partial bundle from its origin: several ranges at once, every chunk checked on arrival.

Whatever ends this, what arrived stays and the next attempt goes on from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

from pop_node.store.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    decode_manifest,
)
from pop_node.store.origin import InterruptedReadError, NoRangesError, Origin, Pieces
from pop_node.store.partial import Partial
from pop_node.store.source import Progress
from wire.errors import ConfigError

T = TypeVar("T")

CONNECTIONS = 4
"""Guess: hides the round trips between ranges; more would push other traffic of the site aside."""

RUN_BYTES = 64 * 1024 * 1024
"""Longest range of one request: a new connection's slow start is lost in it."""

ATTEMPTS = 5
"""Failures in a row, without a chunk in between, after which the origin counts as gone."""

BACKOFF_S = 0.5
"""Before the second attempt; doubles with each failure: eight seconds before the last."""


def fetch_manifest(origin: Origin, url: str) -> Manifest:
    """The manifest of the bundle at ``url``; raises ``ConfigError``."""
    try:
        data = origin.read(MANIFEST_FILE, MAX_MANIFEST_BYTES)
    except InterruptedReadError as exc:
        raise ConfigError(f"the bundle cannot be reached: {exc}") from exc
    if len(data) > MAX_MANIFEST_BYTES:
        raise ConfigError(f"its manifest is larger than {MAX_MANIFEST_BYTES} bytes", where=url)
    return decode_manifest(data, where=f"{url}/{MANIFEST_FILE}")


def fetch_bundle(partial: Partial, origin: Origin, progress: Progress) -> None:
    """Bring everything that ``partial`` lacks. Phases ``resume`` and ``fetch``.

    Raises ``ConfigError`` if the origin is gone or sends something else, ``OSError`` from the disk.
    """
    missing = partial.missing_chunks(progress)
    _Fetch(partial, origin, missing, progress).run()


class _Fetch:
    def __init__(
        self, partial: Partial, origin: Origin, missing: Sequence[int], progress: Progress
    ) -> None:
        self._partial = partial
        self._origin = origin
        self._data = partial.manifest.data
        self._missing = missing
        self._progress = progress
        self._reporting = threading.Lock()
        self._stop = threading.Event()
        self._done = self._data.nbytes - sum(self._data.span(index)[1] for index in missing)

    def run(self) -> None:
        """Text files, then chunks; in one stream if the origin knows no ranges."""
        self._progress("fetch", self._done, self._data.nbytes)
        for entry in self._partial.missing_texts():
            self._insist([entry], self._pull_text)
        try:
            self._run_parallel()
        except NoRangesError:
            self._stop.clear()
            left = self._partial.missing_chunks(lambda *_: None)
            self._insist(left, self._pull_from_beginning)

    def _run_parallel(self) -> None:
        runs = _runs(self._missing, max(1, RUN_BYTES // self._data.chunk_bytes))
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch") as pool:
            futures = [pool.submit(self._insist, run, self._pull_run) for run in runs]
            try:
                for future in futures:
                    future.result()
            finally:  # also after Ctrl-C: the others end at their next chunk
                self._stop.set()
                pool.shutdown(cancel_futures=True)

    def _insist(self, left: list[T], pull: Callable[[list[T]], None]) -> None:
        """Call ``pull``, which takes what arrived out of ``left``, until nothing is left."""
        failures = 0
        while left and not self._stop.is_set():
            before = len(left)
            cause = f"what it sends is not what the manifest names, from {left[0]} on"
            try:
                pull(left)
            except InterruptedReadError as exc:
                cause = str(exc)
            if not left:
                return
            failures = failures + 1 if len(left) == before else 1
            if failures == ATTEMPTS:
                raise ConfigError(
                    f"the bundle could not be fetched: {cause}",
                    suggestion="what has arrived is kept: the same command goes on from there",
                )
            self._stop.wait(BACKOFF_S * 2 ** (failures - 1))

    def _pull_text(self, left: list[FileEntry]) -> None:
        entry = left[0]
        if self._partial.put_text(entry, self._origin.read(entry.name, entry.nbytes)):
            left.pop()

    def _pull_run(self, left: list[int]) -> None:
        """``left``: chunks that follow each other."""
        start = self._data.span(left[0])[0]
        stop = sum(self._data.span(left[-1]))
        stream = self._origin.stream(self._data.name, start, stop)
        for index, chunk in self._cut(stream, list(left)):
            if not self._put(index, chunk):
                return
            left.pop(0)

    def _pull_from_beginning(self, left: list[int]) -> None:
        stream = self._origin.stream(self._data.name, 0, self._data.nbytes)
        for index, chunk in self._cut(stream, range(len(self._data.chunks))):
            if left and index == left[0]:
                if not self._put(index, chunk):
                    return
                left.pop(0)

    def _put(self, index: int, chunk: bytearray) -> bool:
        if self._stop.is_set() or not self._partial.put_chunk(index, memoryview(chunk)):
            return False
        with self._reporting:
            self._done += len(chunk)
            self._progress("fetch", self._done, self._data.nbytes)
        return True

    def _cut(self, stream: Pieces, indexes: Iterable[int]) -> Iterator[tuple[int, bytearray]]:
        """Whole chunks of a stream that begins with the first of ``indexes``."""
        kept = bytearray()
        with closing(stream):
            for index in indexes:
                nbytes = self._data.span(index)[1]
                while len(kept) < nbytes:
                    piece = next(stream, b"")
                    if not piece:
                        return
                    kept += piece
                yield index, kept[:nbytes]
                del kept[:nbytes]


def _runs(indexes: Sequence[int], longest: int) -> list[list[int]]:
    """Chunks that follow each other, at most ``longest`` together."""
    runs: list[list[int]] = []
    for index in indexes:
        if runs and runs[-1][-1] + 1 == index and len(runs[-1]) < longest:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs
