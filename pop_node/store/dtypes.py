"""Element types of stored tensors, and exact conversion between them without torch.

Arrays carry the *stored* bits: bfloat16, which numpy lacks, is a uint16 array. Narrowing rounds to
nearest, ties to even, as IEEE 754 asks and torch does.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wire.errors import ConfigError

Dtype = Literal["bfloat16", "float32"]
"""What a bundle's weights may be stored as."""

Array = NDArray[Any]

STORED_AS: dict[Dtype, str] = {"bfloat16": "BF16", "float32": "F32"}

_STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}
"""safetensors' names -> the numpy type of the stored bits."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def storage(dtype: str) -> np.dtype[Any]:
    """Stored element type; raises ``ConfigError`` for one we do not convert (e.g. 8-bit floats)."""
    try:
        return _STORAGE[dtype]
    except KeyError:
        raise ConfigError(
            f"tensors of type {dtype} are not supported",
            suggestion="use the unquantised float32, float16 or bfloat16 weights",
        ) from None


def stored_dtype(dtype: str, target: Dtype) -> str:
    """What a tensor of ``dtype`` becomes in a bundle of ``target``: only floats are converted."""
    storage(dtype)
    return STORED_AS[target] if dtype in _FLOATS else dtype


def convert(array: Array, source: str, target: str) -> Array:
    """``array`` (stored bits of ``source``) as stored bits of ``target``; same shape."""
    if source == target:
        return array
    wide = _to_float32(array, source)
    return float32_to_bfloat16(wide) if target == "BF16" else wide


def _to_float32(array: Array, source: str) -> NDArray[np.float32]:
    if source == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Upper halves of the rounded values. A NaN keeps its sign and becomes the quiet one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    half = (bits >> 16) & 1
    half += 0x7FFF  # below a tie when the kept part is even, a tie when it is odd
    half += bits
    half >>= 16
    rounded = half.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = ((bits[nan] >> 16) & 0x8000).astype(np.uint16) | 0x7FC0
    return rounded
