"""Packing parts of matrices into the resident form as they arrive, as values or as coded blocks, by
ctypes. Imports no torch.

Addresses and lengths in; whoever calls keeps the memory and answers for the bounds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Array, Structure, c_char_p, c_int, c_long, c_uint8, c_void_p
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.native.build import NativeUnavailableError
from kernels.resident_layout import PALETTE

SAMPLE_WEIGHTS = 1 << 16
"""Weights that a palette is chosen by, about: rare exponents that they miss become escapes, and
counting goes at 2 GB/s. Measured on SmolLM2: 20,000 escapes for the 15,000 of whole counts, of 134
million weights."""

Keys = NDArray[np.uint64]
"""Escapes of a matrix, each with its tile: tile << 32 | escape."""


class Palette(Structure):
    """``pm_palette``: of a matrix; chosen by its first part, so it must not be copied or moved."""

    _fields_ = (("chosen", c_int), ("exponents", c_uint8 * PALETTE))


class Part(Structure):
    """``pm_pack_arrival``: ``N`` rows of ``K`` columns, ``ld`` weights apart, to ``tiles``, which
    lie ``tile_bytes`` apart; ``tile`` and ``group`` number the first ones in the matrix."""

    _fields_ = (
        ("rows", c_void_p),
        ("N", c_long),
        ("K", c_long),
        ("ld", c_long),
        ("tiles", c_void_p),
        ("tile_bytes", c_long),
        ("tile", c_long),
        ("group", c_long),
        ("_matrix_palette", c_void_p),
        ("_keys", c_void_p),
        ("_room", c_long),
        ("palette", POINTER(Palette)),
        ("escapes", c_long),
    )


class PartPacker:
    """Packs with the kernels of one instruction set; all of them make the same bytes."""

    def __init__(self, library: Path, isa: str = "") -> None:
        """Load ``library``; ``isa`` "" picks the fastest that this processor runs.

        Raises:
            NativeUnavailableError: the library does not load, or the processor lacks ``isa``.
        """
        try:
            lib: Any = ctypes.CDLL(str(library))
        except OSError as exc:
            raise NativeUnavailableError(f"{library} does not load: {exc}") from exc
        lib.pm_kernels_of.argtypes, lib.pm_kernels_of.restype = [c_char_p], c_void_p
        self._pack = lib.pm_resident_pack_parts
        self._pack.argtypes = [c_void_p, c_void_p, c_long, c_long, c_void_p, c_long]
        self._pack.restype = c_long
        self._decode = lib.pm_resident_decode_parts
        self._decode.argtypes = [
            *[c_void_p, c_void_p, c_long] * 2,
            c_long,
            c_long,
            c_void_p,
            c_long,
        ]
        self._decode.restype = c_long
        self._kernels = lib.pm_kernels_of(isa.encode())
        if self._kernels is None:
            raise NativeUnavailableError(f"cannot run {isa} kernels on this machine")

    def pack(self, parts: Sequence[Part], room: Keys) -> list[Keys]:
        """Pack ``parts`` on this thread, without Python's lock; any number of threads may do so.

        Args:
            room: for keys; where it does not suffice, more is had for a while.

        Returns:
            The keys of each part, ascending; perhaps views of ``room``.
        """
        array: Array[Part] = (Part * len(parts))(*parts)
        return self._keys(array, self._run(array, room), room)

    def decode(
        self,
        blocks: NDArray[np.uint8],
        out: NDArray[np.uint8],
        parts: Sequence[Part],
        room: Keys,
    ) -> list[Keys]:
        """As ``kernels.codec.decode_run``, and packs ``parts``, which lie in ``out`` in order, on
        the way: each tile while it is in a near cache. The rest is as of ``pack``.

        Raises:
            CodecError: as ``decode_run``; what was packed means nothing then.
        """
        # Only here: raw models are packed without it, and a cold start counts every import.
        from kernels.codec.native import raise_for

        array: Array[Part] = (Part * len(parts))(*parts)
        total = self._decode(
            *(self._kernels, blocks.ctypes.data, len(blocks), out.ctypes.data, len(out)),
            *(ctypes.addressof(array), len(array), SAMPLE_WEIGHTS, room.ctypes.data, len(room)),
        )
        raise_for(total)
        return self._keys(array, total, room)

    def _keys(self, array: Array[Part], total: int, room: Keys) -> list[Keys]:
        """Those of each part, of which ``room`` has as many as it has room for."""
        if total > len(room):
            room = np.empty(total, np.uint64)
            self._run(array, room)
        ends = accumulate((part.escapes for part in array), initial=0)
        return [room[begin:end] for begin, end in pairwise(ends)]

    def _run(self, array: Array[Part], room: Keys) -> int:
        total: int = self._pack(
            *(self._kernels, ctypes.addressof(array), len(array), SAMPLE_WEIGHTS),
            *(room.ctypes.data, len(room)),
        )
        return total
