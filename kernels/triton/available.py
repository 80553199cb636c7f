"""Whether Triton kernels can run here. Imports no triton: it is an optional part."""

from __future__ import annotations

import importlib.util

import torch

MIN_CAPABILITY = (8, 0)
"""Of the device: the first with bfloat16 in its tensor cores (Ampere). Source: CUDA C++ Programming
Guide, compute capabilities."""


class TritonUnavailableError(Exception):
    """The Triton backend cannot be had; the message says why."""


def find_device() -> torch.device:
    """The current CUDA device.

    Raises:
        TritonUnavailableError: no device, one that is too old, or no triton.
    """
    if not torch.cuda.is_available():
        raise TritonUnavailableError("torch sees no CUDA device")
    if importlib.util.find_spec("triton") is None:
        raise TritonUnavailableError("triton is not installed")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise TritonUnavailableError(
            f"the device has compute capability {capability}, needs {MIN_CAPABILITY}"
        )
    return device
