"""What a captured step does, held against the rules of CUDA graphs without a GPU: it launches.

While a graph is captured nothing may wait for the device, read a number from it, copy from or to
the host, or compile; and a replay repeats the launches with the addresses and numbers that they
had. Kernels are noted here, not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_interpreted_model import CONFIG, interpreted_ops, weights
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.triton.launch import Launch
from pop_node.engine.running.cuda_runner import CudaRunner
from pop_node.engine.running.device_sampler import DeviceSampler
from pop_node.models.llama import Llama, LlamaConfig
from tests.fakes.late_device import LateDevice

BLOCKS, BLOCK_TOKENS, SEATS = 12, 16, 6

ON_THE_DEVICE = {
    *("new_empty", "empty", "empty_like", "zeros_like", "fill_", "copy_"),
    *("lt", "rsub", "clamp_", "where", "index", "linear", "matmul", "mm"),
    *("view", "flatten", "slice", "select", "unbind", "split_with_sizes", "numpy_T", "to"),
}
"""Of torch's operations those that launch kernels or make views, and return at once on CUDA. None
reads a number (``item``) or finds sizes out (``nonzero``). ``to`` is the logits' on a CPU alone."""


class Watched(TorchDispatchMode):
    """Notes torch's operations by name, with the devices that they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class WatchedDevice(LateDevice):
    """Runs what is to be captured once more, watched."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self._launches = launches
        self.names: set[str] = set()
        self.warm: list[list[Launch]] = []
        self.captured: list[list[Launch]] = []

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self._launches.clear()
        work()
        self.warm.append(list(self._launches))
        self._launches.clear()
        with Watched() as watched:
            work()
        self.captured.append(list(self._launches))
        self.names |= watched.names
        return work


def compiled_for(launch: Launch) -> tuple[object, ...]:
    """What decides which machine code a launch needs, and its grid."""
    arguments = [
        (value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, torch.Tensor) else value
        for value in launch.arguments.values()
    ]
    settings = (launch.warps, launch.stages, launch.grid)
    return launch.kernel, *arguments, *sorted(launch.constants.items()), *settings


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_captured_step_only_launches(
    batch_invariant: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch, **how: launches.append(launch))
    device = WatchedDevice(launches)
    config = LlamaConfig.from_hf(CONFIG)
    model = Llama(config, weights(rng), interpreted_ops(batch_invariant), "float32")
    runner = CudaRunner(
        model,
        device,
        DeviceSampler(),
        BLOCKS,
        BLOCK_TOKENS,
        token_budget=32,
        max_sequences=SEATS,
        context_tokens=config.context_tokens,
    )
    while runner.prepare():
        pass
    assert device.names <= ON_THE_DEVICE, device.names - ON_THE_DEVICE
    assert len(device.captured) == 4  # of 1, 2, 4 and 6 rows
    for warm, captured in zip(device.warm, device.captured, strict=True):
        assert captured
        # What the runs before a capture compiled is what the capture launches.
        assert [compiled_for(launch) for launch in captured] == [
            compiled_for(launch) for launch in warm
        ]
