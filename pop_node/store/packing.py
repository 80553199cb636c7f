"""Writes a bundle's tensors in another codec: the same model, chunk by chunk in other bytes.

Chunks are read, checked, coded and decoded again on several threads, and written in order. A chunk
becomes a block per *piece*: what lies in it of one dtype, cut at tensors, because each has its own
distribution. A chunk that does not become shorter by a page stays as it is; a bundle of which none
does is the raw one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from blake3 import blake3

from kernels import codec as blocks
from pop_node.store.bundle import read_texts
from pop_node.store.files import begin_writing, sync_directory, write_durably
from pop_node.store.image import ImageFile, decode_chunk, unpacked
from pop_node.store.layout import aligned
from pop_node.store.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    PACKED_VERSION,
    DataFile,
    Manifest,
    Packing,
    bundle_digest,
    encode_manifest,
)
from pop_node.store.source import Progress
from pop_node.store.tensor_file import write_all
from wire.errors import ConfigError

CODED = {"BF16": "bfloat16", "F16": "float16"}
"""Stored dtypes that the codec shrinks, and their names there."""

INTEGERS = ("I8", "U8", "I16", "I32", "I64", "BOOL")

AHEAD = 2
"""Chunks per thread that are coded or wait to be written."""


PIECE_BYTES, LEAST_PIECE_BYTES = 1024 * 1024, 256 * 1024
"""Longest piece, and the least at whose end the next tensor begins one. Measured on SmolLM2: 4 MiB
cost 0.3 % more, for one table fits all; below 256 KiB the tables take what they gain."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes ``[offset, offset + nbytes)`` of a chunk; ``dtype`` of its tensors, "" for none."""

    offset: int
    nbytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class PackedPiece:
    """What became of a piece at ``offset`` of the image: bytes before and after, and what its
    entropy allows (``limit_bytes``: signs and mantissas whole, exponents at the entropy of the
    piece's own distribution). ``reason`` says why it is stored as it is, "" if it is packed."""

    offset: int
    decoded_bytes: int
    stored_bytes: int
    limit_bytes: float
    reason: str


@dataclass(frozen=True, slots=True)
class Packed:
    """A bundle that was written, and how its pieces did, in order."""

    manifest: Manifest
    pieces: list[PackedPiece]


def write_packed(
    bundle: Path, manifest: Manifest, codec: str, path: Path, progress: Progress
) -> Packed:
    """Write the model of ``bundle`` into the new directory ``path``, durably; phase ``pack``.

    Every packed chunk was decoded again and is equal. Raises ``ConfigError`` if the bundle is
    damaged, ``OSError`` from the disk.
    """
    path.mkdir()
    data = manifest.data
    ends, digests, pieces = [], [], []
    at = done = 0
    with (path / data.name).open("xb", buffering=0) as file:
        with closing(_coded(bundle / data.name, manifest, codec)) as coded:
            for stored, packed_pieces in coded:
                write_all(file.fileno(), stored, at)
                begin_writing(file.fileno(), at, len(stored))
                at += len(stored)
                ends.append(at)
                digests.append(blake3(stored).hexdigest())
                pieces += packed_pieces
                done += sum(piece.decoded_bytes for piece in packed_pieces)
                progress("pack", done, data.decoded_bytes)
        os.fsync(file.fileno())
    texts = read_texts(bundle, manifest)
    for name, text in texts.items():
        write_durably(path / name, text)
    shrunk = at < data.decoded_bytes
    packed = msgspec.structs.replace(
        manifest,
        format_version=PACKED_VERSION if shrunk else FORMAT_VERSION,
        data=DataFile(
            data.name,
            at,
            codec if shrunk else "raw",
            data.chunk_bytes,
            digests,
            Packing(data.decoded_bytes, ends) if shrunk else None,
        ),
    )
    packed = msgspec.structs.replace(packed, bundle=bundle_digest(packed))
    write_durably(path / MANIFEST_FILE, encode_manifest(packed))
    sync_directory(path)
    return Packed(packed, pieces)


_Coded = tuple[memoryview, list[PackedPiece]]


def _coded(weights: Path, manifest: Manifest, codec: str) -> Generator[_Coded]:
    """The stored form of each chunk, in order."""
    threads = len(os.sched_getaffinity(0))
    waiting: deque[Future[_Coded]] = deque()
    with ImageFile(weights, manifest.data) as file, ThreadPoolExecutor(threads) as pool:
        try:
            for index, pieces in enumerate(chunk_pieces(manifest)):
                if len(waiting) == AHEAD * threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(_code, file, manifest.data, index, pieces, codec))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _code(file: ImageFile, data: DataFile, index: int, pieces: list[Piece], codec: str) -> _Coded:
    found = file.read_stored(index)
    if blake3(found).hexdigest() != data.chunks[index]:
        raise ConfigError(f"chunk {index} does not match its digest", where=str(file.path))
    chunk = unpacked(file.path, data, index, found)
    start = data.decoded_span(index)[0]
    if codec == "raw":
        return chunk, [_kept(piece, start, "raw was asked for") for piece in pieces]
    coded = [
        blocks.encode(chunk[piece.offset : piece.offset + piece.nbytes], CODED.get(piece.dtype, ""))
        for piece in pieces
    ]
    nbytes = aligned(sum(map(len, coded)))
    told = [_told(piece, start, block) for piece, block in zip(pieces, coded, strict=True)]
    if nbytes >= len(chunk):
        return chunk, [
            _kept(piece, start, about.reason or "saves less than a page of its chunk")
            for piece, about in zip(pieces, told, strict=True)
        ]
    stored = memoryview(b"".join(coded).ljust(nbytes, b"\0"))
    again = memoryview(bytearray(len(chunk)))
    decode_chunk(stored, again, index, str(file.path))
    if again != chunk:
        raise ConfigError(f"chunk {index} does not come back from its packed form: this is a bug")
    padding = nbytes - sum(map(len, coded))
    last = replace(told[-1], stored_bytes=told[-1].stored_bytes + padding)
    return stored, [*told[:-1], last]


def _kept(piece: Piece, start: int, reason: str) -> PackedPiece:
    return PackedPiece(start + piece.offset, piece.nbytes, piece.nbytes, piece.nbytes, reason)


def _told(piece: Piece, start: int, block: bytes) -> PackedPiece:
    about = blocks.describe(block)
    limit, reason = float(piece.nbytes), about.raw_reason or ""
    if piece.dtype not in CODED:
        reason = f"{piece.dtype or 'no'} values are not coded"
        if piece.dtype in INTEGERS:
            reason = f"{piece.dtype} values (integers, quantised weights) have no exponents to code"
    elif not reason:
        limit *= about.limit_bits_per_value / 16
    return PackedPiece(start + piece.offset, piece.nbytes, len(block), limit, reason)


def chunk_pieces(manifest: Manifest) -> Iterator[list[Piece]]:
    """The pieces of each chunk, which together are the chunk; padding goes with what is before."""
    data = manifest.data
    tensors = [entry for entry in manifest.tensors if entry.nbytes]
    first = 0  # the tensor that the chunk begins in, or the next one
    for index in range(len(data.chunks)):
        start, nbytes = data.decoded_span(index)
        while first + 1 < len(tensors) and tensors[first + 1].offset <= start:
            first += 1
        pieces = [Piece(0, 0, tensors[first].dtype if tensors else "")]
        number = first + 1
        while number < len(tensors) and tensors[number].offset < start + nbytes:
            at, dtype = tensors[number].offset - start, tensors[number].dtype
            pieces[-1] = replace(pieces[-1], nbytes=at - pieces[-1].offset)
            if dtype != pieces[-1].dtype or pieces[-1].nbytes >= LEAST_PIECE_BYTES:
                pieces.append(Piece(at, 0, dtype))
            number += 1
        pieces[-1] = replace(pieces[-1], nbytes=nbytes - pieces[-1].offset)
        yield [part for piece in pieces for part in _parts(piece)]


def _parts(piece: Piece) -> Iterator[Piece]:
    for at in range(0, piece.nbytes, PIECE_BYTES):
        yield Piece(piece.offset + at, min(PIECE_BYTES, piece.nbytes - at), piece.dtype)
