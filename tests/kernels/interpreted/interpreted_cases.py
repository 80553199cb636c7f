"""Shared by the interpreted tests: dtypes and tolerances."""

from __future__ import annotations

import numpy as np
import torch

# Allowed |triton - reference| <= atol + rtol |reference|, for results of magnitude about 1.
# float16 has 11 bits: one rounding is 2^-12 relative, and probabilities are rounded before the
# second product; bfloat16 has 8.
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 1e-3, "rtol": 2e-3},
    torch.bfloat16: {"atol": 1e-2, "rtol": 1.6e-2},
}
DTYPES = list(TOLERANCE)
DOT_DTYPES = [torch.float32, torch.float16]
"""Of tests of matrix products: the interpreter multiplies the bits of bfloat16 as integers."""


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert agreement within the table; NaN anywhere fails."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), **TOLERANCE[actual.dtype])


def matmul_in_one_order(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """For ``np.matmul``, whose last bits depend on where in the tile a row lies: terms in a row."""
    return (a.astype(dtype)[:, :, None] * b.astype(dtype)[None]).sum(axis=1)
