"""The C library as Python sees it: loading, argument types, and the life of a context.

A context owns the thread pool. Knows ctypes, not torch: callers pass addresses as integers.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import (
    POINTER,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_long,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

from kernels.native.build import NativeUnavailableError

_POINTER, _LONG, _INT, _FLOAT = c_void_p, c_long, c_int, c_float

# Argument types after the context, in the order of popmesh_native.c.
_OPERATIONS: dict[str, list[Any]] = {
    "pm_linear": [_INT, *[_POINTER] * 4, *[_LONG] * 3, _INT],
    "pm_norm": [_INT, *[_POINTER] * 5, *[_LONG] * 2, _FLOAT],
    "pm_silu_mul": [_INT, *[_POINTER] * 2, *[_LONG] * 2],
    "pm_rope_kv_write": [
        *[_INT, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG],
        *[_POINTER] * 5,
        *[_LONG] * 4,
    ],
    "pm_attention": [
        *[_INT, _POINTER, _LONG],
        *[_POINTER] * 6,
        *[_LONG] * 6,
        _FLOAT,
    ],
    "pm_forward": [_INT, *[_POINTER] * 2, *[_LONG] * 2],
    "pm_resident_linear": [*[_POINTER] * 4, *[_LONG] * 3, _INT],
    "pm_sample": [
        *[_POINTER, _LONG, _LONG],
        *[POINTER(c_float)] * 2,
        POINTER(c_uint64),
        *[POINTER(c_uint32)] * 3,
        POINTER(c_float),
        POINTER(c_int64),
    ],
    "pm_penalize": [*[_POINTER] * 3, _LONG, *[_FLOAT] * 3],
}


class NativeContext:
    """A loaded library with a pool of ``threads`` workers (the caller included).

    Attributes:
        isa: instruction set of its kernels: ``avx512_bf16``, ``avx512``, ``avx2`` or ``portable``.
        handle: address to pass first to every operation of ``lib``.
    """

    def __init__(self, library: Path, threads: int, isa: str | None = None) -> None:
        """Load ``library`` and start the pool.

        Args:
            isa: kernels to use; None picks the fastest that this processor runs.

        Raises:
            ValueError: ``threads`` is below 1.
            NativeUnavailableError: the library does not load, the processor lacks ``isa``, or
                threads cannot be started.
        """
        if threads < 1:
            raise ValueError(f"threads is {threads}, must be at least 1")
        try:
            self.lib: Any = ctypes.CDLL(str(library))
        except OSError as exc:
            raise NativeUnavailableError(f"{library} does not load: {exc}") from exc
        for name, argtypes in _OPERATIONS.items():
            operation = getattr(self.lib, name)
            operation.argtypes = [c_void_p, *argtypes]
            operation.restype = c_int
        self.lib.pm_workspace_bytes.argtypes = [_INT, _POINTER, _LONG]
        self.lib.pm_workspace_bytes.restype = c_size_t
        self.lib.pm_resident_pack.argtypes = [
            *[_POINTER] * 2,
            *[_LONG] * 4,
            *[_POINTER] * 4,
            _LONG,
        ]
        self.lib.pm_resident_pack.restype = _LONG
        self.lib.pm_best_isa.restype = c_char_p
        self.lib.pm_open.argtypes, self.lib.pm_open.restype = [c_int, c_char_p], c_void_p
        self.lib.pm_close.argtypes, self.lib.pm_close.restype = [c_void_p], None
        self.isa = isa or self.lib.pm_best_isa().decode()
        self.handle: int | None = self.lib.pm_open(threads, self.isa.encode())
        if self.handle is None:
            raise NativeUnavailableError(
                f"cannot run {self.isa} kernels with {threads} threads on this machine"
            )
        weakref.finalize(self, self.lib.pm_close, self.handle)
