"""Who is launched so that it may overlap: kernels that wait for their turn, when asked for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from kernel_cases import paged_batch

from kernels.triton.launch import Launch
from kernels.triton.ops import TritonOps


class NotedKernel:
    """Stands for a kernel; remembers how it was launched."""

    def __init__(self) -> None:
        self.launched: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> NotedKernel:
        return self

    def __call__(self, **how: Any) -> None:
        self.launched.append(how)


def test_a_launch_overlaps_only_where_it_is_asked_to() -> None:
    kernel = NotedKernel()
    launch = Launch(kernel, (1,), {"x": 1}, {"BLOCK": 2}, warps=8, stages=1)
    launch.run()
    launch.run(overlap=True)
    plain = {"x": 1, "BLOCK": 2, "num_warps": 8, "num_stages": 1}
    assert kernel.launched == [plain, plain | {"OVERLAP": True, "launch_pdl": True}]


@pytest.mark.parametrize("overlap", [False, True])
def test_the_kernels_of_a_decode_step_overlap_and_each_of_them_waits(
    overlap: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[Any, bool]] = []

    def noted(launch: Launch, *, overlap: bool = False) -> None:
        found.append((launch.kernel, overlap))

    monkeypatch.setattr(Launch, "run", noted)
    ops = TritonOps(20, overlap=overlap)
    batch = paged_batch(
        rng, [(1, 600)], kv_heads=2, head_dim=8, block_tokens=16, dtype=torch.float32
    )
    x, q, kv = torch.ones(1, 64), torch.ones(1, 4, 8), torch.ones(1, 2, 8)
    ops.add_rms_norm(x, x, torch.ones(64), 1e-5)
    ops.linear(x, torch.ones(32, 64), None)
    ops.gate_up(x, torch.ones(32, 64))
    ops.logits(x, torch.ones(32, 64))
    ops.rope_kv_write(q, kv, kv, torch.ones(600, 8), batch.meta, batch.k_cache, batch.v_cache)
    ops.attention(q, batch.k_cache, batch.v_cache, batch.meta, 1.0)
    assert len(found) == 7  # the keys are split: attention merges
    for kernel, overlaps in found:
        assert overlaps is overlap
        assert "    await_turn(OVERLAP)\n" in inspect.getsource(kernel.fn)
    # Many rows are cuBLAS's, and gates have a kernel that does not wait: launched as usual.
    found.clear()
    ops.gate_up(torch.ones(9, 64), torch.ones(32, 64))
    assert [overlaps for _, overlaps in found] == [False]
