"""What a bundle says about itself, and the digests that name models and bundles.

Two digests, two questions. *Identity*: do two nodes compute the same thing? It covers the decoded
tensors, the configuration that reaches the math, the tokenizer and the chat template, and nothing
about how they are stored. *Bundle digest*: are these the same files? It covers all of the manifest
that a program acts on, chunk digests included, so whoever holds it can check a manifest from
anywhere, and with the manifest every chunk. All digests are BLAKE3, hex.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec
from blake3 import blake3

from pop_node.store.dtypes import Dtype, storage
from pop_node.store.layout import ALIGNMENT, TensorEntry
from wire.errors import ConfigError

FORMAT_VERSION, PACKED_VERSION = 2, 3
"""Of raw and of packed bundles: who reads only the first refuses the others by their number."""

MANIFEST_FILE = "manifest.json"

TABLES_FILE = "weights.json"
"""Beside the manifest, no part of the bundle: ``pop_node.store.weight_tables``."""
WEIGHTS_FILE = "weights.bin"
CODECS = ("raw", "exponent")
"""How chunks may be stored: as they are, or with their exponents coded (``kernels.codec``)."""

MAX_MANIFEST_BYTES = 64 * 1024 * 1024
"""Guess: one of 1 TB of weights in 100,000 tensors has 40 MB."""

MAX_FILE_BYTES = 256 * 1024 * 1024
"""Guess: a tokenizer.json has up to 33 MB; this stops weights under a wrong name."""

MAX_CHUNK_BYTES = 64 * 1024 * 1024
"""A loader keeps a buffer of one chunk per reading thread."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

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


class FileEntry(msgspec.Struct, frozen=True):
    """A text file of the bundle."""

    name: str
    nbytes: int
    blake3: str


class Packing(msgspec.Struct, frozen=True):
    """Where packed chunks lie: stored chunk i ends at byte ``ends[i]`` of the file, the next one
    begins there. The image of all chunks has ``decoded_bytes``.

    A chunk that is stored shorter than it is in the image is blocks of the codec back to back, each
    of which names its dtype and lengths, then zeros up to a multiple of ``ALIGNMENT`` (0.2 % of a
    packed chunk of 4 MiB at most), so that it can be read directly. A chunk that did not shrink by
    that much is stored as it is.
    """

    decoded_bytes: int
    ends: list[int]


class DataFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """The file of all tensors, ``nbytes`` long, and the image that it decodes to.

    Chunk i is bytes ``[i, i + 1) * chunk_bytes`` of the image, the last one shorter. Without a
    ``packing`` the file is the image. ``chunks`` are the digests of what is stored.
    """

    name: str
    nbytes: int
    codec: str
    chunk_bytes: int
    chunks: list[str]
    packing: Packing | None = None

    @property
    def decoded_bytes(self) -> int:
        """Of the image."""
        return self.nbytes if self.packing is None else self.packing.decoded_bytes

    def decoded_span(self, index: int) -> tuple[int, int]:
        """(offset, length) of a chunk in the image."""
        offset = index * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.decoded_bytes - offset)

    def span(self, index: int) -> tuple[int, int]:
        """(offset, length) of a chunk in the file."""
        if self.packing is None:
            return self.decoded_span(index)
        ends = self.packing.ends
        offset = ends[index - 1] if index else 0
        return offset, ends[index] - offset

    def is_packed(self, index: int) -> bool:
        """Whether a chunk is stored as blocks of the codec."""
        return self.span(index)[1] < self.decoded_span(index)[1]

    def spans(self) -> Iterator[tuple[int, int]]:
        """``span`` of all chunks, in order."""
        return (self.span(index) for index in range(len(self.chunks)))

    @property
    def longest_chunk(self) -> int:
        """Bytes of the longest chunk in the file; 0 without chunks."""
        return max((nbytes for _, nbytes in self.spans()), default=0)

    def chunks_of(self, start: int, stop: int) -> range:
        """Chunks that hold bytes ``[start, stop)`` of the file, which must not be empty."""
        if self.packing is None:
            return range(start // self.chunk_bytes, -(-stop // self.chunk_bytes))
        ends = self.packing.ends
        return range(bisect.bisect_right(ends, start), bisect.bisect_left(ends, stop) + 1)


class KvGeometry(msgspec.Struct, frozen=True):
    """Size of the KV cache: per token and layer, K and V of ``kv_heads`` heads of ``head_dim``."""

    layers: int
    kv_heads: int
    head_dim: int


class Manifest(msgspec.Struct, frozen=True):
    """Description of a bundle.

    ``name`` is the name it was asked for by; the copy on disk keeps the one it was first added
    under, because names come and go while a bundle stays as it is. ``source``, ``licence`` and
    ``created_by`` are for people. Every tensor with an axis consists of ``stripes`` stripes.
    """

    format_version: int
    name: str
    identity: str
    bundle: str
    dtype: str
    stripes: int
    tensors: list[TensorEntry]
    data: DataFile
    files: list[FileEntry]
    source: str
    licence: str
    kv: KvGeometry
    context_tokens: int
    created_by: str

    @property
    def total_bytes(self) -> int:
        """Of all files but the manifest."""
        return self.data.nbytes + sum(entry.nbytes for entry in self.files)


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


_FOR_PEOPLE = frozenset({"name", "bundle", "source", "licence", "created_by"})


def bundle_digest(manifest: Manifest) -> str:
    """Digest of everything in a manifest but itself and what is only for people."""
    facts = msgspec.structs.asdict(manifest)
    return _digest("popmesh bundle 2", {k: v for k, v in facts.items() if k not in _FOR_PEOPLE})


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
    """JSON for people and programs."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


class OutdatedBundleError(ConfigError):
    """A bundle of an earlier format: adding its model again converts it."""


def read_manifest(bundle: Path) -> Manifest:
    """Manifest of a bundle directory.

    Raises ``OutdatedBundleError`` for an earlier format, ``ConfigError`` if it is missing or not
    ours.
    """
    path = bundle / MANIFEST_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ConfigError(f"larger than {MAX_MANIFEST_BYTES} bytes", where=str(path))
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"the manifest cannot be read: {exc}", where=str(path)) from exc
    return decode_manifest(data, where=str(path))


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """A manifest from anywhere: well-formed, consistent, and the one its bundle digest names.

    Raises as ``read_manifest`` does.
    """
    try:
        version = _VERSION.decode(data).format_version
        if version == 1:
            raise OutdatedBundleError(
                f"bundle format 1, this popmesh reads {FORMAT_VERSION}",
                where=where,
                suggestion="add the model again under its name with 'popmesh model add': that "
                "converts it on this disk",
            )
        if version not in (FORMAT_VERSION, PACKED_VERSION):
            raise ConfigError(
                f"bundle format {version}, this popmesh reads {FORMAT_VERSION} and "
                f"{PACKED_VERSION}",
                where=where,
                suggestion="remove the model and add it again",
            )
        manifest = _MANIFEST.decode(data)
        _check(manifest)
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise ConfigError(f"the manifest cannot be read: {exc}", where=where) from exc
    return manifest


class _Version(msgspec.Struct):
    format_version: int


_VERSION, _MANIFEST = msgspec.json.Decoder(_Version), msgspec.json.Decoder(Manifest)
"""Made by whoever imports this: the first load would wait 0.5 ms for them (measured)."""


def _check(manifest: Manifest) -> None:
    """Raises ``ValueError``. Whoever reads by these numbers need not check them again."""
    data = manifest.data
    if data.name != WEIGHTS_FILE or data.codec not in CODECS:
        raise ValueError(f"data file {data.name!r} in codec {data.codec!r} is not understood")
    if not (0 < data.chunk_bytes <= MAX_CHUNK_BYTES and data.chunk_bytes % ALIGNMENT == 0):
        raise ValueError(f"chunks of {data.chunk_bytes} bytes cannot be read directly")
    for nbytes in (data.nbytes, data.decoded_bytes):
        if nbytes < 0 or nbytes % ALIGNMENT:
            raise ValueError(f"{nbytes} bytes of data cannot be read directly")
    if len(data.chunks) != -(-data.decoded_bytes // data.chunk_bytes):
        raise ValueError(f"{len(data.chunks)} chunks do not make {data.decoded_bytes} bytes")
    _check_packing(manifest)
    if manifest.dtype not in get_args(Dtype):
        raise ValueError(f"weights in {manifest.dtype!r} are not understood")
    if not 1 <= manifest.stripes <= 1024:
        raise ValueError(f"{manifest.stripes} stripes")
    _check_tensors(manifest)
    names = [entry.name for entry in manifest.files]
    if len(set(names)) != len(names) or not {"config.json", "tokenizer.json"} <= set(names):
        raise ValueError("files are missing or twice there")
    for entry in manifest.files:
        if not _FILE_NAME.fullmatch(entry.name) or entry.name in (MANIFEST_FILE, WEIGHTS_FILE):
            raise ValueError(f"{entry.name!r} cannot be a file of a bundle")
        if not 0 <= entry.nbytes <= MAX_FILE_BYTES:
            raise ValueError(f"{entry.name} has {entry.nbytes} bytes")
    digests = [manifest.identity, manifest.bundle, *data.chunks]
    digests += [entry.blake3 for entry in manifest.tensors]
    digests += [entry.blake3 for entry in manifest.files]
    if not all(_DIGEST.fullmatch(digest) for digest in digests):
        raise ValueError("a digest is malformed")
    if bundle_digest(manifest) != manifest.bundle:
        raise ValueError("it is not the one that its bundle digest names")


def _check_packing(manifest: Manifest) -> None:
    data, packing = manifest.data, manifest.data.packing
    is_packed = manifest.format_version == PACKED_VERSION
    if not is_packed == (data.codec != "raw") == (packing is not None):
        raise ValueError(f"format {manifest.format_version} does not go with {data.codec!r}")
    if packing is None:
        return
    if len(packing.ends) != len(data.chunks) or (packing.ends or [0])[-1] != data.nbytes:
        raise ValueError("packed chunks do not make the file")
    for index, (start, end) in enumerate(pairwise([0, *packing.ends])):
        nbytes = end - start
        if not 0 < nbytes <= data.decoded_span(index)[1] or nbytes % ALIGNMENT:
            raise ValueError(f"packed chunk {index} cannot have {nbytes} bytes")


def _check_tensors(manifest: Manifest) -> None:
    end = 0
    unit, dtype = -1, ""
    for entry in manifest.tensors:
        if any(size < 0 for size in entry.shape):
            raise ValueError(f"tensor {entry.name} has a negative size")
        if entry.nbytes != math.prod(entry.shape) * storage(entry.dtype).itemsize:
            raise ValueError(f"tensor {entry.name} has not the bytes of its shape")
        begins = entry.offset % ALIGNMENT == 0 and entry.offset >= end and entry.unit > unit
        if not (begins or (entry.unit == unit and entry.offset == end)):
            raise ValueError(f"tensor {entry.name} is out of place")
        if entry.unit == unit and entry.dtype != dtype:  # nor could it be aligned for a view
            raise ValueError(f"tensor {entry.name} is no {dtype}, as others of its unit are")
        if entry.axis is not None:
            fits = len(entry.shape) == 2 and entry.axis in (0, 1)
            if not fits or entry.shape[entry.axis] % manifest.stripes:
                raise ValueError(f"tensor {entry.name} cannot have {manifest.stripes} stripes")
        end, unit, dtype = entry.offset + entry.nbytes, entry.unit, entry.dtype
    if end > manifest.data.decoded_bytes:
        raise ValueError("tensors reach beyond their file")
    if len({entry.name for entry in manifest.tensors}) != len(manifest.tensors):
        raise ValueError("a tensor is there twice")
