"""What a bundle says about itself, and the digests that name models and bundles.

Two digests, two questions. *Identity*: do two nodes compute the same thing? It covers the decoded
tensors, the configuration that reaches the math, the tokenizer and the chat template, and nothing
about how they are stored. *Bundle digest*: are these the same files? All digests are BLAKE3, hex.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from wire.errors import ConfigError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"

_NOT_MATH = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "initializer_range",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Configuration keys that no output depends on (the tensors state their own types). Everything else
counts: an unknown key may make two models differ, it must never make two different ones equal."""


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor: bytes ``[offset, offset + nbytes)`` of the weights file, little-endian, C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    blake3: str


class FileEntry(msgspec.Struct, frozen=True):
    """A file of the bundle."""

    name: str
    nbytes: int
    blake3: str


class KvGeometry(msgspec.Struct, frozen=True):
    """Size of the KV cache: per token and layer, K and V of ``kv_heads`` heads of ``head_dim``."""

    layers: int
    kv_heads: int
    head_dim: int


class Manifest(msgspec.Struct, frozen=True):
    """Description of a bundle.

    ``name`` is the name it was asked for by; the copy on disk keeps the one it was first added
    under, because names come and go while a bundle stays as it is. ``source`` and ``licence`` are
    for people.
    """

    format_version: int
    name: str
    identity: str
    bundle: str
    dtype: str
    tensors: list[TensorEntry]
    files: list[FileEntry]
    total_bytes: int
    source: str
    licence: str
    kv: KvGeometry
    context_tokens: int
    created_by: str


def model_identity(
    tensors: Sequence[TensorEntry],
    config: Mapping[str, Any],
    tokenizer_json: bytes,
    chat_template: str,
) -> str:
    """Digest of everything that decides which tokens a model produces for a request."""
    facts = {
        "tensors": sorted((t.name, t.dtype, t.shape, t.blake3) for t in tensors),
        "config": {key: value for key, value in config.items() if key not in _NOT_MATH},
        "tokenizer": blake3(tokenizer_json).hexdigest(),
        "chat_template": blake3(chat_template.encode()).hexdigest(),
    }
    return _digest("popmesh model 1", facts)


def bundle_digest(files: Sequence[FileEntry]) -> str:
    """Digest of a bundle's files (the manifest, which holds it, not among them)."""
    return _digest("popmesh bundle 1", sorted((f.name, f.nbytes, f.blake3) for f in files))


def _digest(kind: str, facts: object) -> str:
    canonical = msgspec.json.encode(facts, order="deterministic")
    return blake3(kind.encode() + b"\n" + canonical).hexdigest()


def kv_geometry(config: Mapping[str, Any]) -> KvGeometry:
    """KV size from a Hugging Face configuration; raises ``ConfigError`` if it does not say."""
    layers = config_integer(config, "num_hidden_layers")
    heads = config_integer(config, "num_attention_heads")
    kv_heads = config_integer(config, "num_key_value_heads", heads)
    head_dim = config_integer(config, "head_dim", config_integer(config, "hidden_size") // heads)
    return KvGeometry(layers, kv_heads, head_dim)


def config_integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of a model's configuration, or ``default`` where absent or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {key} is {value!r}, not a positive integer")
    return value


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON for people and programs: one line per top-level entry is enough to read it."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def read_manifest(bundle: Path) -> Manifest:
    """Manifest of a bundle directory; raises ``ConfigError`` if it is missing or not ours."""
    path = bundle / MANIFEST_FILE
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"bundle format {version}, this popmesh reads {FORMAT_VERSION}",
                where=str(path),
                suggestion="remove the model and add it again",
            )
        return msgspec.json.decode(data, type=Manifest)
    except (OSError, msgspec.DecodeError) as exc:
        raise ConfigError(f"the manifest cannot be read: {exc}", where=str(path)) from exc


class _Version(msgspec.Struct):
    format_version: int
