"""What of a node's store can be given: complete bundles, and those that are arriving."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pop_node.peers.inventory import Stocked
from pop_node.store.arrivals import Arrivals, is_filled
from pop_node.store.manifest import MANIFEST_FILE, Manifest, read_manifest
from pop_node.store.store import Store
from wire.errors import ConfigError

_DIGEST = re.compile(r"[0-9a-f]{64}")

MAX_KEPT = 64
"""Manifests in memory: more than a node has models; the largest possible take 40 MB each."""


@dataclass(frozen=True, slots=True)
class Item:
    """A bundle as it is now; ``marks`` None: complete, else a byte per chunk."""

    path: Path
    manifest: Manifest
    marks: bytes | None

    def has(self, start: int, stop: int) -> bool:
        """Whether bytes ``[start, stop)`` of the data file are there."""
        data = self.manifest.data
        if not 0 <= start < stop <= data.nbytes:
            return False
        if self.marks is None:
            return True
        return all(self.marks[index] for index in data.chunks_of(start, stop))

    def files(self) -> frozenset[str]:
        """Names of its files."""
        texts = (entry.name for entry in self.manifest.files)
        return frozenset({MANIFEST_FILE, self.manifest.data.name, *texts})


class Stock:
    """Looks at the disk; may be used from several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[str, Manifest] = {}
        self._keeping = threading.Lock()

    def find(self, digest: str) -> Item | None:
        """The bundle of that digest; None if not a byte of it can be given."""
        if not _DIGEST.fullmatch(digest):
            return None
        try:
            # In this order: one that is completed meanwhile is found at the second look.
            return self._partial(digest) or self._complete(digest)
        except (ConfigError, OSError):  # gone or damaged: it is not to be had here
            return None

    def listing(self) -> list[Stocked]:
        """All that can be given; what is damaged is left out. Raises ``ConfigError`` if the disk
        cannot be looked at."""
        names: dict[str, list[str]] = {}
        for row in self._store.entries():
            names.setdefault(row[1].bundle, []).append(row[0])
        for _, manifest in self._store.partials():
            names.setdefault(manifest.bundle, []).append(manifest.name)
        return [item for digest in sorted(names) for item in self._stocked(digest, names[digest])]

    def _stocked(self, digest: str, names: list[str]) -> Iterator[Stocked]:
        item = self.find(digest)
        if item is not None:
            manifest = item.manifest
            chunks = len(manifest.data.chunks)
            arrived = chunks if item.marks is None else sum(item.marks)
            yield Stocked(
                bundle=digest,
                identity=manifest.identity,
                dtype=manifest.dtype,
                names=sorted(set(names)),
                nbytes=manifest.data.nbytes,
                chunks=chunks,
                arrived=arrived,
            )

    def _partial(self, digest: str) -> Item | None:
        """Only while somebody fills it: marks that a dead process left are not to be trusted."""
        path = self._store.partial_path(digest)
        if not is_filled(path):
            return None
        manifest = self._manifest(digest, path)
        arrivals = Arrivals.of(path, manifest)
        if arrivals is None:
            return None
        with arrivals:
            return Item(path, manifest, arrivals.marks())

    def _complete(self, digest: str) -> Item | None:
        path = self._store.bundle_path(digest)
        if not path.is_dir():
            return None
        return Item(path, self._manifest(digest, path), None)

    def _manifest(self, digest: str, path: Path) -> Manifest:
        """Bundles never change, so neither does this; raises ``ConfigError``."""
        manifest = self._kept.get(digest)
        if manifest is None:
            manifest = read_manifest(path)
            if manifest.bundle != digest:
                raise ConfigError("the manifest is not this bundle's", where=str(path))
            with self._keeping:
                if len(self._kept) >= MAX_KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[digest] = manifest
        return manifest
