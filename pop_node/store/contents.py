"""What a store has: looked at without a lock and without write access.

So many nodes may share a store that is read-only to them. Whoever loads or serves a bundle holds it
(``pop_node.store.holding``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from pop_node.store.arrivals import is_filled
from pop_node.store.bundle import check_claims, read_texts
from pop_node.store.facts import Bundle, Row
from pop_node.store.files import tree_bytes
from pop_node.store.holding import Hold, claimed, last_used_ns
from pop_node.store.manifest import MANIFEST_FILE, Manifest, OutdatedBundleError, read_manifest
from pop_node.store.names import NameEntry, Names, check_name
from wire.errors import ConfigError


class Contents:
    """The part of ``pop_node.store.store.Store`` that changes nothing; its module says what lies
    where. Safe to use from several threads and processes at once."""

    def __init__(self, root: Path) -> None:
        """``root`` need not exist."""
        self.root = root
        self._bundles = root / "bundles"
        self._names = Names(root / "names")
        self._partial = root / "partial"

    def list(self) -> Sequence[Manifest]:
        """All models that can be used, sorted by name; those of an earlier format are left out.

        Raises ``ConfigError`` if one is damaged.
        """
        found = []
        for name in self._names.all():
            with suppress(OutdatedBundleError):
                found.append(self._read(name).manifest)
        return found

    def rows(self) -> Sequence[Row]:
        """All names with all that is known about them, damaged ones included; sorted.

        Raises ``ConfigError`` if nobody can say which there are.
        """
        rows = []
        for name in self._names.all():
            with suppress(ConfigError):  # gone since, or a name file that means nothing
                rows.append(self._row(name, self._names.need(name)))
        return rows

    def row(self, name: str) -> Row:
        """As one of ``rows``; raises ``ConfigError`` with a suggestion if there is none."""
        check_name(name)
        return self._row(name, self._names.need(name))

    def get(self, name: str) -> Bundle:
        """The bundle a name means, its text files checked.

        Raises ``ConfigError`` with a suggestion if there is none or it is damaged.
        """
        check_name(name)
        bundle = self._read(name)
        read_texts(bundle.path, bundle.manifest)
        return bundle

    def has(self, name: str) -> bool:
        """Whether there is such a name with a bundle of this format; damaged or not."""
        try:
            self._read(name)
        except OutdatedBundleError:
            return False
        except ConfigError:
            return self._names.has(name)
        return True

    def lacks(self, name: str) -> bool:
        """Whether the name or its bundle is not there; what is damaged is. Reads no manifest: this
        takes no time, however large the model is."""
        try:
            entry = self._names.read(name)
            return entry is None or not (self._bundles / entry.bundle / MANIFEST_FILE).is_file()
        except (ConfigError, OSError):
            return False

    def hold(self, name: str) -> Hold:
        """Keep the bundle of a name (``Hold.bundle``) from being collected or removed.

        For the time between ``get`` and the moment at which whoever loads it has a hold of its own.
        Raises ``ConfigError`` as ``get`` does, or if it is just being removed.
        """
        check_name(name)
        return Hold(self._read(name).path)

    def open_partial(self, wanted: str) -> Bundle | None:
        """A bundle that is arriving, if an engine can begin to load it: loaders wait for chunks.

        ``wanted``: the name it is fetched by, its digest or its model's identity. None if nobody
        fetches it now, or its text files are not all there yet. Its path is good until it is
        complete, then ``get`` knows it.
        """
        for path, manifest in self.partials():
            if wanted in (manifest.name, manifest.bundle, manifest.identity) and is_filled(path):
                with suppress(ConfigError):
                    check_claims(path, manifest)
                    return Bundle(path, manifest)
        return None

    def entries(self) -> Iterator[tuple[str, NameEntry]]:
        """All names and what they mean, those left out whose file is damaged; reads no bundle.
        Raises as ``rows`` does."""
        for name in self._names.all():
            with suppress(ConfigError):
                yield name, self._names.need(name)

    def partials(self) -> Iterator[tuple[Path, Manifest]]:
        """All bundles that are not complete, whether somebody fills them or not.

        Raises ``ConfigError`` if nobody can say.
        """
        try:
            paths = sorted(self._partial.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(self._partial)) from exc
        for path in paths:
            with suppress(ConfigError):  # just begun, or gone since
                yield path, read_manifest(path)

    def bundle_path(self, digest: str) -> Path:
        """Where the bundle of that digest is, if it is complete and here."""
        return self._bundles / digest

    def partial_path(self, digest: str) -> Path:
        """Where the bundle of that digest is while it arrives."""
        return self._partial / digest

    def _read(self, name: str) -> Bundle:
        entry = self._names.need(name)
        path = self._bundles / entry.bundle
        manifest = read_manifest(path)
        if manifest.bundle != entry.bundle:
            raise ConfigError("the manifest is not this bundle's", where=str(path))
        return Bundle(path, msgspec.structs.replace(manifest, name=name))

    def _row(self, name: str, entry: NameEntry) -> Row:
        path = self._bundles / entry.bundle
        manifest, problem = None, ""
        try:
            manifest = self._read(name).manifest
        except ConfigError as exc:
            problem = str(exc)
        nbytes, used_ns, loaded = 0, 0, False
        try:
            with claimed(path) as free:
                loaded = not free
            nbytes, used_ns = tree_bytes(path), last_used_ns(path)
        except OSError as exc:
            problem = problem or f"{path}: cannot be read: {exc}"
        return Row(name, entry, manifest, problem, nbytes, used_ns, loaded)
