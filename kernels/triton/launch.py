"""A kernel launch as a value: planned by pure code, then run, or compiled without a GPU.

``kernels.triton.compiled`` builds for sm_90 what a plan over meta tensors says, so that what is
checked for spills is what an engine would launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """``kernel`` over ``grid`` programs.

    ``arguments`` are values of the run (tensors, integers, floats), ``constants`` its constexprs.
    ``stages``: depth of the software pipeline of loads. Integers that change from step to step are
    not specialised in the kernels, or a step could wait for a compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, torch.Tensor | int | float]
    constants: Mapping[str, int | bool]
    warps: int = 4
    stages: int = 3

    def run(self, *, overlap: bool = False) -> None:
        """Queue it on the current stream; an empty grid is no launch. ``overlap``: its programs may
        start while those of the launch before end, see ``kernels.triton.overlap``."""
        if 0 in self.grid:
            return
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if overlap:
            options |= {"OVERLAP": True, "launch_pdl": True}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


def require(fits: bool, what: str, *tensors: torch.Tensor) -> None:
    """Raises ValueError naming ``what`` and the shapes, unless ``fits``."""
    if not fits:
        shapes = [(tuple(t.shape), str(t.dtype)) for t in tensors]
        raise ValueError(f"{what}: tensors {shapes} do not fit")


def same_dtype(*tensors: torch.Tensor) -> bool:
    """Whether all have one dtype that the kernels know."""
    dtype = tensors[0].dtype
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and all(tensor.dtype is dtype for tensor in tensors)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def rows_of_heads(x: torch.Tensor) -> bool:
    """[T, heads, D] whose heads lie side by side; rows may be apart (a slice of fused QKV)."""
    return x.dim() == 3 and x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)
