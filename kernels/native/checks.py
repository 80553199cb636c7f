"""What the native operations ask of tensors before they hand out addresses."""

from __future__ import annotations

import torch

from kernels.resident import Weight

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def dtype_code(*tensors: Weight) -> int:
    """The C code of the tensors' one dtype.

    Raises:
        ValueError: dtypes differ, or it is neither float32 nor bfloat16.
    """
    dtype = tensors[0].dtype
    code = _DTYPES.get(dtype)
    if code is None or any(t.dtype is not dtype for t in tensors):
        raise ValueError(f"dtypes {[t.dtype for t in tensors]}: need one of {list(_DTYPES)}")
    return code


def are_indices(dtype: torch.dtype, *tensors: torch.Tensor) -> bool:
    """Whether C can read each of ``tensors`` as an array of ``dtype``."""
    return all(one.dtype is dtype and one.is_contiguous() for one in tensors)


def require(fits: bool, what: str, *tensors: torch.Tensor) -> None:
    """Raises ValueError, with the shapes of ``tensors``, unless they ``fits``."""
    if not fits:
        raise ValueError(f"{what}: shapes {[tuple(t.shape) for t in tensors]} do not fit")
