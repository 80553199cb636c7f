"""The safetensors container: read its header, lay out a new one.

Owns the format (8 bytes of header length, JSON header, tensor bytes without gaps); must not know
models. Written by hand because the library writes whole tensors from memory and numpy has no
bfloat16; reading by hand gives byte ranges, which is what chunked conversion and verification need.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pop_node.store.dtypes import Array, storage
from wire.errors import ConfigError

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's own limit."""

CHUNK_BYTES = 16 * 1024 * 1024
"""Guess: large enough that seeks do not count, small enough to keep several in memory."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """Where a tensor lies: bytes ``[offset, offset + nbytes)`` of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> list[TensorSpan]:
    """Tensors of a file, in the order of their bytes.

    Raises ``ConfigError`` if it is not a well-formed safetensors file: every span is checked
    against its shape and the size of the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
            header = json.loads(file.read(header_bytes))
        spans = [
            _span(name, entry, 8 + header_bytes, size)
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ConfigError(f"not a valid safetensors file: {exc}", where=str(path)) from exc
    return sorted(spans, key=lambda span: (span.offset, span.name))


def _span(name: str, entry: dict[str, object], data_start: int, size: int) -> TensorSpan:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise TypeError(f"tensor {name} is described wrongly")
    if any(not isinstance(n, int) or n < 0 for n in (*shape, *offsets)):
        raise ValueError(f"tensor {name} has a size that is no size")
    begin, end = offsets
    nbytes = math.prod(shape) * storage(dtype).itemsize
    if end - begin != nbytes or not 0 <= begin <= end <= size - data_start:
        raise ValueError(f"tensor {name} does not fit its byte range")
    return TensorSpan(name, dtype, tuple(shape), data_start + begin, nbytes)


def read_chunks(path: Path, span: TensorSpan) -> Iterator[Array]:
    """A tensor's elements, flat and in order, in arrays of at most ``CHUNK_BYTES``."""
    dtype = storage(span.dtype)
    with path.open("rb") as file:
        file.seek(span.offset)
        left = span.nbytes
        while left:
            data = file.read(min(left, CHUNK_BYTES))
            if not data:
                raise ConfigError(f"tensor {span.name} is cut short", where=str(path))
            left -= len(data)
            yield np.frombuffer(data, dtype)
