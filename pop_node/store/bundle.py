"""Writes and checks bundles: a data file of canonical tensors, text files, the manifest.

Canonical means in the order of ``pop_node.store.layout``, converted to one dtype. The same source
and dtype give the same bytes, hence the same digests. Memory holds a few chunks, never the model.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from pop_node.models.storage_order import storage_order
from pop_node.store.dtypes import Dtype
from pop_node.store.files import sync_directory, write_durably
from pop_node.store.image import ImageFile, UndecodableError
from pop_node.store.layout import TensorEntry
from pop_node.store.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    bundle_digest,
    config_integer,
    encode_manifest,
    kv_geometry,
    model_identity,
)
from pop_node.store.source import Progress, SourceModel, template_text
from pop_node.store.tensor_file import chunk_digests, read_rows, write_tensors
from wire.errors import ConfigError


def write_bundle(
    model: SourceModel, *, name: str, source: str, dtype: Dtype, path: Path, progress: Progress
) -> Manifest:
    """Write ``model`` into the new directory ``path``, durably; phases ``convert`` and ``digest``.

    Raises ``ConfigError`` if the model's configuration is incomplete, a tensor is of an unsupported
    type or has more or fewer elements than its shape.
    """
    config = _with_dtype(model.config, dtype)
    kv = kv_geometry(config)
    context_tokens = config_integer(config, "max_position_embeddings")
    order = storage_order(config)
    path.mkdir()
    tensors, data = write_tensors(model.tensors, dtype, order, path, progress)
    texts = {"generation_config.json": b"{}\n", "tokenizer_config.json": b"{}\n", **model.files}
    texts["config.json"] = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    entries = []
    for file_name, text in sorted(texts.items()):
        write_durably(path / file_name, text)
        entries.append(FileEntry(file_name, len(text), blake3(text).hexdigest()))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        identity=model_identity(tensors, config, texts["tokenizer.json"], model.chat_template),
        bundle="",
        dtype=dtype,
        stripes=order.stripes,
        tensors=tensors,
        data=data,
        files=entries,
        source=source,
        licence=model.licence,
        kv=kv,
        context_tokens=context_tokens,
        created_by=f"popmesh {version('popmesh')}",
    )
    manifest = msgspec.structs.replace(manifest, bundle=bundle_digest(manifest))
    write_durably(path / MANIFEST_FILE, encode_manifest(manifest))
    sync_directory(path)
    return manifest


ADD_AGAIN = "remove the model and add it again with 'popmesh model add'"
DAMAGED = f"the disk or the copy is damaged: {ADD_AGAIN}"
"""What to do about a file that differs from its digest."""


class UnusableTextError(ConfigError):
    """A text file of one model is damaged, or of a kind that is not understood: that model cannot
    be served, others can."""

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(message, where=where, suggestion=ADD_AGAIN)


def read_texts(path: Path, manifest: Manifest) -> dict[str, bytes]:
    """The text files of a bundle, each checked against its digest.

    Raises ``UnusableTextError`` naming the file that differs or cannot be read.
    """
    texts = {}
    for entry in manifest.files:
        file = path / entry.name
        try:
            right_size = file.stat().st_size == entry.nbytes
            text = file.read_bytes() if right_size else b""
        except OSError as exc:
            raise UnusableTextError(f"cannot be read: {exc}", where=str(file)) from exc
        if not right_size or blake3(text).hexdigest() != entry.blake3:
            raise UnusableTextError("does not match its digest", where=str(file))
        texts[entry.name] = text
    return texts


class FalseClaimError(ConfigError):
    """A manifest is not that of the model it names: whoever gave it, its bundle is of no use."""


def check_claims(path: Path, manifest: Manifest) -> None:
    """The text files are there, and with the tensors as named they make the identity as named and
    the sizes: memory is planned by these before anything is computed.

    Raises ``FalseClaimError`` if they do not, ``ConfigError`` if a file is damaged. What the
    tensors really are is left to ``check_model``.
    """
    texts = read_texts(path, manifest)
    try:
        config = json.loads(texts["config.json"])
        if not isinstance(config, dict):
            raise ConfigError("config.json is not a JSON object")
        identity = model_identity(
            manifest.tensors, config, texts["tokenizer.json"], template_text(texts)
        )
        size = kv_geometry(config), config_integer(config, "max_position_embeddings")
    except (ConfigError, ValueError, RecursionError) as exc:
        raise FalseClaimError(f"cannot be read: {exc}", where=str(path)) from exc
    if (identity, *size) != (manifest.identity, manifest.kv, manifest.context_tokens):
        raise FalseClaimError("the model is not the one its manifest names", where=str(path))


def check_bundle(path: Path, manifest: Manifest, progress: Progress) -> None:
    """Read every byte and recompute every digest, the model's identity included; phase ``verify``.

    Raises ``ConfigError`` naming the file, chunk or tensor that differs.
    """
    data, weights = manifest.data, path / manifest.data.name
    total = data.nbytes + _tensor_bytes(manifest)
    done = 0
    try:
        if weights.stat().st_size != data.nbytes:
            raise ConfigError(f"does not have {data.nbytes} bytes", where=str(weights))
        for index, digest in enumerate(chunk_digests(weights, data.spans())):
            if digest != data.chunks[index]:
                raise ConfigError(
                    f"chunk {index} does not match its digest",
                    where=str(weights),
                    suggestion=DAMAGED,
                )
            done += data.span(index)[1]
            progress("verify", done, total)
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc}", where=str(weights)) from exc
    check_model(path, manifest, lambda phase, more, _: progress(phase, done + more, total))


def check_model(
    path: Path, manifest: Manifest, progress: Progress, checked: Collection[str] = ()
) -> None:
    """Of a bundle whose chunks match their digests: decoded, it is the model it claims to be.

    Reads every text file and every tensor but those ``checked`` before, phase ``verify``. Raises as
    ``check_claims`` does, naming what differs.
    """
    total, done = _tensor_bytes(manifest), 0
    with open_image(path, manifest) as image:
        for entry in manifest.tensors:
            if entry.name not in checked:
                check_tensor(image, manifest, entry)
            done += entry.nbytes
            progress("verify", done, total)
    check_claims(path, manifest)


def open_image(path: Path, manifest: Manifest) -> ImageFile:
    """The tensors of a bundle, to be checked; raises ``ConfigError`` if they are not there."""
    weights = path / manifest.data.name
    try:
        return ImageFile(weights, manifest.data)
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc}", where=str(weights)) from exc


def check_tensor(image: ImageFile, manifest: Manifest, entry: TensorEntry) -> None:
    """Raises ``FalseClaimError`` if it is not the one named, ``ConfigError`` if it is not there."""
    weights = image.path
    whole = blake3()
    try:
        for rows in read_rows(image, entry, manifest.stripes):
            whole.update(rows)
    except UndecodableError as exc:  # its chunks match their digests: they were never good
        raise FalseClaimError(str(exc)) from exc
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc}", where=str(weights)) from exc
    if whole.hexdigest() != entry.blake3:
        raise FalseClaimError(f"tensor {entry.name} is not the one named", where=str(weights))


def _tensor_bytes(manifest: Manifest) -> int:
    return sum(entry.nbytes for entry in manifest.tensors)


def _with_dtype(config: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    """The configuration with the weights' type, under the key that every reader knows."""
    kept = {key: value for key, value in config.items() if key != "dtype"}
    return {**kept, "torch_dtype": dtype}
