"""Writes and checks bundles: a safetensors file of canonical tensors, text files, the manifest.

Canonical means sorted by name, converted to one dtype, row-major. The same source and dtype give
the same bytes, hence the same digests. Memory holds a few chunks, never the model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from pop_node.store.dtypes import Dtype, convert, stored_dtype
from pop_node.store.files import sync_directory, write_durably
from pop_node.store.huggingface import open_huggingface
from pop_node.store.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    FileEntry,
    Manifest,
    TensorEntry,
    bundle_digest,
    config_integer,
    encode_manifest,
    kv_geometry,
    model_identity,
)
from pop_node.store.safetensors_file import CHUNK_BYTES, TensorSpan, lay_out, read_header
from pop_node.store.source import Progress, SourceModel, SourceTensor
from wire.errors import ConfigError


def write_bundle(
    model: SourceModel, *, name: str, source: str, dtype: Dtype, path: Path, progress: Progress
) -> Manifest:
    """Write ``model`` into the new directory ``path``, durably; reports the phase ``convert``.

    Raises ``ConfigError`` if the model's configuration is incomplete, a tensor is of an unsupported
    type or has more or fewer elements than its shape.
    """
    config = _with_dtype(model.config, dtype)
    kv = kv_geometry(config)
    context_tokens = config_integer(config, "max_position_embeddings")
    path.mkdir()
    tensors, weights = _write_weights(model.tensors, dtype, path / WEIGHTS_FILE, progress)
    entries = [weights]
    texts = {"generation_config.json": b"{}\n", "tokenizer_config.json": b"{}\n", **model.files}
    texts["config.json"] = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    for file_name, data in sorted(texts.items()):
        write_durably(path / file_name, data)
        entries.append(FileEntry(file_name, len(data), blake3(data).hexdigest()))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        identity=model_identity(tensors, config, texts["tokenizer.json"], model.chat_template),
        bundle=bundle_digest(entries),
        dtype=dtype,
        tensors=tensors,
        files=entries,
        total_bytes=sum(entry.nbytes for entry in entries),
        source=source,
        licence=model.licence,
        kv=kv,
        context_tokens=context_tokens,
        created_by=f"popmesh {version('popmesh')}",
    )
    write_durably(path / MANIFEST_FILE, encode_manifest(manifest))
    sync_directory(path)
    return manifest


def check_bundle(path: Path, manifest: Manifest) -> None:
    """Read every byte and recompute every digest, the model's identity included.

    Raises ``ConfigError`` naming the file or tensor that differs.
    """
    for entry in manifest.files:
        try:
            digest = _hash_file(path / entry.name)
        except OSError as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(path / entry.name)) from exc
        if digest != entry.blake3:
            raise ConfigError("does not match its digest", where=str(path / entry.name))
    model = open_huggingface(path)
    spans = {span.name: span for span in read_header(path / WEIGHTS_FILE)}
    found = []
    for tensor in model.tensors:
        whole = blake3()
        for chunk in tensor.chunks():
            whole.update(chunk.data.cast("B"))
        found.append(_entry(spans[tensor.name], whole.hexdigest()))
    if sorted(found, key=lambda entry: entry.name) != manifest.tensors:
        raise ConfigError("the tensor table is not that of the weights", where=str(path))
    identity = model_identity(
        found, model.config, model.files["tokenizer.json"], model.chat_template
    )
    if identity != manifest.identity:
        raise ConfigError("the model is not the one its manifest names", where=str(path))


def _hash_file(path: Path) -> str:
    digest = blake3()
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _with_dtype(config: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    """The configuration with the weights' type, under the key that every reader knows."""
    kept = {key: value for key, value in config.items() if key != "dtype"}
    return {**kept, "torch_dtype": dtype}


def _write_weights(
    sources: Sequence[SourceTensor], dtype: Dtype, path: Path, progress: Progress
) -> tuple[list[TensorEntry], FileEntry]:
    ordered = sorted(sources, key=lambda tensor: tensor.name)
    header, spans = lay_out([(t.name, stored_dtype(t.dtype, dtype), t.shape) for t in ordered])
    total = sum(span.nbytes for span in spans)
    whole = blake3(header)
    entries = []
    done = 0
    with path.open("wb") as file:
        file.write(header)
        for tensor, span in zip(ordered, spans, strict=True):
            digest = blake3()
            left = math.prod(span.shape)
            for chunk in tensor.chunks():
                left -= chunk.size
                data = np.ascontiguousarray(convert(chunk, tensor.dtype, span.dtype)).data.cast("B")
                file.write(data)
                digest.update(data)
                whole.update(data)
                done += len(data)
                progress("convert", done, total)
            if left:
                raise ConfigError(f"tensor {tensor.name} does not have the elements of its shape")
            entries.append(_entry(span, digest.hexdigest()))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return entries, FileEntry(path.name, size, whole.hexdigest())


def _entry(span: TensorSpan, digest: str) -> TensorEntry:
    return TensorEntry(span.name, span.dtype, span.shape, span.offset, span.nbytes, digest)
