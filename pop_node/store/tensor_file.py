"""Writes the data file of a bundle and reads it back tensor by tensor or chunk by chunk.

Knows the stripes of ``pop_node.store.layout``; the way for adding and checking, which may take its
time. Engines load through ``pop_node.store.loader``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3

from pop_node.models.storage_order import StorageOrder
from pop_node.store import layout
from pop_node.store.dtypes import Array, Dtype, convert, storage, stored_dtype
from pop_node.store.files import take_room
from pop_node.store.image import ImageFile, read_all
from pop_node.store.layout import Described, TensorEntry, aligned, lay_out
from pop_node.store.manifest import WEIGHTS_FILE, DataFile
from pop_node.store.source import Progress, SourceTensor
from wire.errors import ConfigError

BAND_BYTES = 16 * 1024 * 1024
"""Rows are written and read in bands of about this size. Guess: seeks between stripes are rare."""


def write_tensors(
    sources: Sequence[SourceTensor],
    dtype: Dtype,
    order: StorageOrder,
    directory: Path,
    progress: Progress,
) -> tuple[list[TensorEntry], DataFile]:
    """Write the data file into ``directory`` and wait until it is on the disk.

    Room is taken first, so a disk that is too full says so at once. Raises ``ConfigError`` as
    ``write_bundle`` does, ``OSError`` from the disk.
    """
    described = [Described(t.name, stored_dtype(t.dtype, dtype), t.shape) for t in sources]
    by_name = {tensor.name: tensor for tensor in sources}
    entries = lay_out(described, order)
    nbytes = aligned(entries[-1].offset + entries[-1].nbytes) if entries else 0
    path = directory / WEIGHTS_FILE
    total = sum(entry.nbytes for entry in entries)
    done = 0
    finished = []
    with path.open("xb", buffering=0) as file:
        if nbytes:
            take_room(file.fileno(), nbytes)
        for entry in entries:
            digest = blake3()
            at = 0
            for band in _bands(by_name[entry.name], entry):
                digest.update(band.data.cast("B"))
                for offset, data in _placed(entry, order.stripes, band, at):
                    write_all(file.fileno(), data, offset)
                at += band.size
                done += band.nbytes
                progress("convert", done, total)
            if at != math.prod(entry.shape):
                raise ConfigError(f"tensor {entry.name} does not have the elements of its shape")
            finished.append(msgspec.structs.replace(entry, blake3=digest.hexdigest()))
        os.fsync(file.fileno())
    chunk_bytes = layout.CHUNK_BYTES
    chunks = []
    spans = [
        (offset, min(chunk_bytes, nbytes - offset)) for offset in range(0, nbytes, chunk_bytes)
    ]
    for digest_text in chunk_digests(path, spans):
        chunks.append(digest_text)
        progress("digest", sum(spans[len(chunks) - 1]), nbytes)
    return finished, DataFile(WEIGHTS_FILE, nbytes, "raw", chunk_bytes, chunks)


def chunk_digests(path: Path, spans: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Digest of each (offset, length) of a file; raises ``OSError``."""
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(b"")
        for offset, nbytes in spans:
            if len(buffer) < nbytes:
                buffer = memoryview(bytearray(nbytes))
            part = buffer[:nbytes]
            read_all(file.fileno(), part, offset)
            yield blake3(part).hexdigest()


def read_rows(image: ImageFile, entry: TensorEntry, stripes: int) -> Iterator[memoryview]:
    """A tensor's bytes in row-major order, a band at a time; raises as ``ImageFile.read``."""
    if entry.axis != 1:
        for at in range(0, entry.nbytes, BAND_BYTES):
            buffer = memoryview(bytearray(min(BAND_BYTES, entry.nbytes - at)))
            image.read(buffer, entry.offset + at)
            yield buffer
        return
    rows = entry.shape[0]
    width = entry.nbytes // rows // stripes if rows else 0
    height = max(1, BAND_BYTES // (width * stripes or 1))
    for first in range(0, rows, height):
        band = np.empty((min(height, rows - first), stripes, width), np.uint8)
        for stripe in range(stripes):
            part = np.empty((len(band), width), np.uint8)
            offset = entry.offset + (stripe * rows + first) * width
            image.read(part.data.cast("B"), offset)
            band[:, stripe] = part
        yield band.data.cast("B")


def _bands(tensor: SourceTensor, entry: TensorEntry) -> Iterator[Array]:
    """Converted elements in row-major order; where columns are striped, whole rows."""
    converted = (
        np.ascontiguousarray(convert(chunk, tensor.dtype, entry.dtype)).reshape(-1)
        for chunk in tensor.chunks()
        if chunk.size
    )
    if entry.axis != 1:
        yield from converted
        return
    columns = entry.shape[1]
    kept = np.empty(0, storage(entry.dtype))
    for chunk in converted:
        kept = np.concatenate([kept, chunk]) if len(kept) else chunk
        whole = len(kept) // columns * columns
        if whole:
            yield kept[:whole].reshape(-1, columns)
            kept = kept[whole:]
    if len(kept):
        raise ConfigError(f"tensor {tensor.name} does not have the elements of its shape")


def _placed(
    entry: TensorEntry, stripes: int, band: Array, at: int
) -> Iterator[tuple[int, memoryview]]:
    """(file offset, bytes) of the parts of a band that begins at element ``at`` of its tensor."""
    if at + band.size > math.prod(entry.shape):
        raise ConfigError(f"tensor {entry.name} does not have the elements of its shape")
    if not band.size:
        return
    if entry.axis != 1:
        yield entry.offset + at * band.itemsize, band.data.cast("B")
        return
    rows, columns = entry.shape
    width = columns // stripes
    for stripe in range(stripes):
        part = np.ascontiguousarray(band[:, stripe * width : (stripe + 1) * width])
        elements = stripe * rows * width + at // columns * width
        yield entry.offset + elements * band.itemsize, part.data.cast("B")


def write_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """``pwrite`` until all is written; raises ``OSError``."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
