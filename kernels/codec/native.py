"""The codec in C, by ctypes: addresses and lengths in, error codes out. Imports no torch."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from kernels.codec.layout import FLOAT_TYPES, Bytes, CodecError
from kernels.native.build import NativeUnavailableError

_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "pm_codec_isa": ([], c_char_p),
    "pm_codec_bound": ([c_long], c_long),
    "pm_codec_encode": ([c_char_p, c_void_p, c_long, c_int, c_void_p, c_int], c_long),
    "pm_codec_check": ([c_char_p, c_void_p, c_long], c_long),
    "pm_codec_decode": ([c_char_p, c_void_p, c_long, c_void_p, c_long, c_int], c_int),
    "pm_codec_decode_run": ([c_char_p, c_void_p, c_long, c_void_p, c_long], c_int),
}

_NO_MEMORY, _OUT_LENGTH, _NO_ISA = -1, -7, -9
_MESSAGES = {
    -2: "a block is cut off",
    -3: "not a block, or of an unknown version",
    -4: "a block has another length than it says",
    -5: "a block's header is damaged",
    -6: "a block's header makes no sense",
    -8: "a block's content is damaged",
    -10: "a block is longer than what it is part of, or has no values",
}
"""Of codec/codec_block.h."""


def raise_for(result: int) -> None:
    """Raises what an error below 0 of ``codec/codec_block.h`` means; nothing for other numbers."""
    if result == _NO_MEMORY:
        raise MemoryError("no memory or threads to decode a block")
    if result < 0:
        raise CodecError(_MESSAGES[result])


def _address(data: Bytes) -> int:
    address: int = data.__array_interface__["data"][0]
    return address


class NativeCodec:
    """The codec of one instruction set.

    Attributes:
        isa: ``avx512``, ``avx2``, ``sse41``, ``neon`` or ``portable``.
    """

    def __init__(self, library: Path, isa: str | None = None) -> None:
        """Load ``library``; ``isa`` None picks the fastest that this processor runs.

        Raises:
            NativeUnavailableError: the library does not load, or the processor lacks ``isa``.
        """
        try:
            self._lib: Any = ctypes.CDLL(str(library))
        except OSError as exc:
            raise NativeUnavailableError(f"{library} does not load: {exc}") from exc
        for name, (argtypes, restype) in _FUNCTIONS.items():
            function = getattr(self._lib, name)
            function.argtypes, function.restype = argtypes, restype
        self.isa: str = isa or self._lib.pm_codec_isa().decode()
        self._isa = self.isa.encode()
        if self._lib.pm_codec_check(self._isa, None, 0) == _NO_ISA:
            raise NativeUnavailableError(f"cannot run the {self.isa} codec on this machine")

    def encode(self, data: Bytes, dtype: str, threads: int) -> bytes:
        """See ``kernels.codec.encode``."""
        kind = FLOAT_TYPES.get(dtype)
        out = np.empty(self._lib.pm_codec_bound(len(data)), np.uint8)
        code = kind.code if kind is not None else 0
        size = self._lib.pm_codec_encode(
            self._isa, _address(data), len(data), code, _address(out), threads
        )
        if size < 0:
            raise MemoryError("no memory or threads to encode a block")
        return out[:size].tobytes()

    def check(self, block: Bytes) -> int:
        """See ``kernels.codec.decoded_bytes``."""
        decoded: int = self._lib.pm_codec_check(self._isa, _address(block), len(block))
        raise_for(decoded)
        return decoded

    def decode_into(self, block: Bytes, out: Bytes, threads: int) -> None:
        """See ``kernels.codec.decode_into``."""
        result = self._lib.pm_codec_decode(
            self._isa, _address(block), len(block), _address(out), len(out), threads
        )
        if result == _OUT_LENGTH:
            raise CodecError(f"a block of {self.check(block)} bytes does not fit into {len(out)}")
        raise_for(result)

    def decode_run(self, blocks: Bytes, out: Bytes) -> None:
        """See ``kernels.codec.decode_run``."""
        result = self._lib.pm_codec_decode_run(
            self._isa, _address(blocks), len(blocks), _address(out), len(out)
        )
        raise_for(result)
