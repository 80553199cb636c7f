"""Lossless coding of 16-bit and 8-bit floating-point values: for disk, wire and KV.

A block says itself what it is, how long, and what it decodes to; ``kernels.codec.layout`` has the
format. What is not ``bfloat16``, ``float16``, ``float8_e4m3fn`` or ``float8_e5m2``, and what does
not shrink, is stored as it is in the same envelope, with the reason.

The work is done in C, by the fastest instruction set of the processor, without holding Python's
lock; all of them, and the reference, write the same bytes. Imports no torch. Without a C compiler
the reference does it, some thousand times slower, and says so once.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kernels.codec.layout import (
    FLOAT_TYPES,
    MAX_DECODED_BYTES,
    BlockInfo,
    Bytes,
    CodecError,
    block_length,
    info,
)
from kernels.codec.native import NativeCodec
from kernels.native.build import NativeUnavailableError, ensure_library
from kernels.reference import exponent_codec as reference

__all__ = [
    "BlockInfo",
    "Buffer",
    "CodecError",
    "block_bytes",
    "decode_into",
    "decode_run",
    "decoded_bytes",
    "describe",
    "encode",
    "is_native",
]

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]
"""C-contiguous memory; its item size plays no part."""


class _Codec(Protocol):
    """What the reference and each instruction set do."""

    def encode(self, data: Bytes, dtype: str, threads: int) -> bytes: ...
    def check(self, block: Bytes) -> int: ...
    def decode_into(self, block: Bytes, out: Bytes, threads: int) -> None: ...
    def decode_run(self, blocks: Bytes, out: Bytes) -> None: ...


@functools.cache
def _codec() -> _Codec:
    """The fastest one here; built on first use."""
    try:
        return NativeCodec(ensure_library())
    except NativeUnavailableError as exc:
        logger.warning("lossless coding by the slow reference: %s", exc)
        return reference


def is_native() -> bool:
    """Whether C does the work here; loads the library, which may mean to compile it."""
    return isinstance(_codec(), NativeCodec)


def _bytes_of(data: Buffer, what: str) -> Bytes:
    """``data`` as [n] uint8, without a copy.

    Raises:
        ValueError: it is not C-contiguous.
    """
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    if not view.c_contiguous:
        raise ValueError(f"{what} is not contiguous")
    return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)


def _writable(out: Buffer) -> Bytes:
    """``out`` as [n] uint8. Raises ValueError: it is not contiguous, or cannot be written."""
    target = _bytes_of(out, "out")
    if not target.flags.writeable and len(target):
        raise ValueError("out cannot be written")
    return target


def _positive(threads: int) -> int:
    if threads < 1:
        raise ValueError(f"threads is {threads}, must be at least 1")
    return threads


def encode(data: Buffer, dtype: str, *, threads: int = 1) -> bytes:
    """One block with the values in ``data``; raw where coding does not help.

    Args:
        dtype: of the values; names that the codec does not know are stored raw.
        threads: that work on it, the caller's included; they pay from a few MB on.

    Raises:
        ValueError: ``data`` is not contiguous, holds part of a value, or more than 1 GiB.
    """
    view = _bytes_of(data, "data")
    kind = FLOAT_TYPES.get(dtype)
    if kind is not None and len(view) % kind.bytes:
        raise ValueError(f"{len(view)} bytes are no whole number of {dtype} values")
    if len(view) > MAX_DECODED_BYTES:
        raise ValueError(f"{len(view)} bytes are too many for one block")
    return _codec().encode(view, dtype, _positive(threads))


def block_bytes(data: Buffer) -> int:
    """Length of the block that ``data``, 16 bytes at least, begins with, to cut it out of more.

    It is what the block says; only ``decoded_bytes`` and ``decode_into`` check that it is true.

    Raises:
        CodecError: no block begins here.
    """
    return block_length(_bytes_of(data, "block").data)


def decoded_bytes(block: Buffer) -> int:
    """How many bytes ``block`` decodes to.

    Raises:
        CodecError: its header is damaged, or it is longer or shorter than it says.
        ValueError: it is not contiguous.
    """
    return _codec().check(_bytes_of(block, "block"))


def decode_into(block: Buffer, out: Buffer, *, threads: int = 1) -> None:
    """Decode ``block`` into ``out``, which has exactly ``decoded_bytes(block)`` bytes.

    Args:
        threads: as in ``encode``.

    Raises:
        CodecError: the block is damaged, or ``out`` is of another length; ``out`` may then hold
            anything, and nothing beyond it was touched.
        ValueError: one of them is not contiguous, or ``out`` cannot be written.
    """
    _codec().decode_into(_bytes_of(block, "block"), _writable(out), _positive(threads))


def decode_run(blocks: Buffer, out: Buffer) -> None:
    """Decode blocks that lie back to back into ``out``, which they fill; what is behind them does
    not count.

    Raises:
        CodecError: a block is damaged, or no block ends where ``out`` does; ``out`` may then hold
            anything, and nothing beyond it was touched.
        ValueError: as ``decode_into``.
    """
    _codec().decode_run(_bytes_of(blocks, "blocks"), _writable(out))


def describe(block: Buffer) -> BlockInfo:
    """What ``block`` says of itself. Raises as ``decoded_bytes`` does."""
    view = _bytes_of(block, "block")
    _codec().check(view)
    return info(view.data)
