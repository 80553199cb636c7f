"""Codecs under test and values that are hard for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernels.codec.layout import FLOAT_TYPES, Bytes
from kernels.codec.native import NativeCodec
from kernels.native.build import NativeUnavailableError, ensure_library
from kernels.reference import exponent_codec

ISAS = ("portable", "neon", "sse41", "avx2", "avx512")
DTYPES = tuple(FLOAT_TYPES)


class ReferenceCodec:
    """The reference, shaped like ``NativeCodec``."""

    isa = "reference"
    encode = staticmethod(exponent_codec.encode)
    check = staticmethod(exponent_codec.check)
    decode_into = staticmethod(exponent_codec.decode_into)
    decode_run = staticmethod(exponent_codec.decode_run)


Codec = ReferenceCodec | NativeCodec


def codecs() -> list[Codec]:
    """The reference and the codec of every instruction set that this processor runs."""
    found: list[Codec] = [ReferenceCodec()]
    for isa in ISAS:
        try:
            found.append(NativeCodec(ensure_library(), isa))
        except NativeUnavailableError:
            assert isa != "portable"
    return found


def as_bytes(values: npt.NDArray[np.generic] | bytes) -> Bytes:
    """The memory of ``values``, of its own."""
    return np.frombuffer(bytes(values) or b"\0", np.uint8)[: len(bytes(values))].copy()


def weights(count: int, dtype: str = "bfloat16", seed: int = 0) -> Bytes:
    """``count`` values spread like a trained matrix: normal, each row at its own scale."""
    rng = np.random.default_rng(seed)
    scale = np.repeat(rng.lognormal(-3.5, 0.4, -(-count // 576)), 576)[:count]
    values = (rng.standard_normal(count) * scale).astype(np.float32)
    if dtype == "float16":
        return as_bytes(values.astype(np.float16))
    upper = as_bytes((values.view(np.uint32) >> 16).astype(np.uint16))
    if dtype == "bfloat16":
        return upper
    half = (
        values.astype(np.float16).view(np.uint16) if dtype == "float8_e5m2" else upper.view("<u2")
    )
    # The upper byte of a float16 is an e5m2; that of a bfloat16 is no e4m3, but as uneven as one.
    return as_bytes((half >> 8).astype(np.uint8) if dtype == "float8_e5m2" else _as_e4m3(values))


def _as_e4m3(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """``values`` scaled into the range of e4m3 and cut off to its bits."""
    bits = (values * np.float32(64)).view(np.uint32)
    exponent = np.clip((bits >> 23 & 255).astype(np.int64) - 127 + 7, 0, 15)
    return ((bits >> 31 << 7) | (exponent.astype(np.uint32) << 3) | (bits >> 20 & 7)).astype(
        np.uint8
    )


def u16(*values: int) -> Bytes:
    """Little-endian words."""
    return as_bytes(np.array(values, "<u2"))


SPECIAL: dict[str, Callable[[], Bytes]] = {
    "nothing": lambda: as_bytes(b""),
    "one": lambda: u16(0x3F80),
    "negative zero": lambda: u16(*[0x8000] * 1000),
    "zeros": lambda: u16(*[0] * 1000),
    "infinities": lambda: u16(*[0x7F80, 0xFF80] * 700),
    "NaN payloads": lambda: u16(*[*range(0x7F81, 0x8000), *range(0xFF81, 0x10000)] * 5),
    "subnormals": lambda: u16(*[*range(0x80), *range(0x8000, 0x8080)] * 5),
    "every pattern": lambda: as_bytes(np.arange(65536, dtype="<u2")),
    "every pattern after many of one": lambda: as_bytes(
        np.concatenate([np.full(400_000, 0x3C11), np.arange(65536)]).astype("<u2")
    ),
    "a constant tensor": lambda: u16(*[0x3C11] * 40_000),
    "two exponents": lambda: u16(*[0x3C11, 0x3D91] * 20_000),
    "sixteen exponents": lambda: as_bytes((np.arange(9999) % 16 << 7 | 0x2000).astype("<u2")),
    "seventeen exponents": lambda: as_bytes((np.arange(9999) % 17 << 7 | 0x2000).astype("<u2")),
    # The fifteen in the table are as rare as the other 241: nearly all are escapes.
    "all escapes": lambda: as_bytes((np.arange(40_000) % 256 << 7).astype("<u2")),
    "escapes at a row's ends": lambda: as_bytes(
        np.where(np.arange(66_000) % 32 % 31 == 0, np.arange(66_000) % 200 << 7, 0x3C11).astype(
            "<u2"
        )
    ),
    "one rare exponent": lambda: u16(*[0x3C11] * 70_000, 0x0911),
}
"""Bit patterns of bfloat16; the other dtypes take them as they come."""

for _count in (1, 2, 31, 32, 33, 63, 64, 65, 576, 32767, 32768, 32769, 65536, 98305):
    SPECIAL[f"{_count} weights"] = lambda count=_count: weights(count)
