"""Native norm, gate, rotary embedding and KV write against the reference, on every ISA."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, ISAS, close, native, paged_batch

from kernels.reference.activation import silu_mul
from kernels.reference.norm import add_rms_norm, rms_norm
from kernels.reference.rope import rope_kv_write

pytestmark = [pytest.mark.parametrize("isa", ISAS), pytest.mark.parametrize("dtype", DTYPES)]


@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 63), (2, 576), (130, 257), (1, 16)])
def test_norms(isa: str, dtype: torch.dtype, rows: int, hidden: int, rng: torch.Generator) -> None:
    ops = native(isa)
    x, residual = torch.randn(2, rows, hidden, generator=rng).to(dtype).unbind()
    weight = torch.randn(hidden, generator=rng).to(dtype)
    close(ops.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    kept = residual.clone()
    actual, expected = (
        ops.add_rms_norm(x, residual, weight, 1e-5),
        add_rms_norm(x, residual, weight, 1e-5),
    )
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(residual, kept)
    close(actual[0], expected[0])


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 111), (40, 1536)])
def test_silu_mul(
    isa: str, dtype: torch.dtype, rows: int, width: int, rng: torch.Generator
) -> None:
    x = 4 * torch.randn(rows, 2 * width, generator=rng)
    x[0, 0] = -200.0  # e^200 overflows: the result is a clean zero
    x = x.to(dtype)
    close(native(isa).silu_mul(x), silu_mul(x))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (2, 2, 6), (8, 1, 80)])
def test_rope_kv_write(
    isa: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rng: torch.Generator
) -> None:
    batch = paged_batch(
        rng,
        [(1, 9), (7, 7), (150, 163)],
        kv_heads=kv_heads,
        head_dim=dim,
        block_tokens=4,
        dtype=dtype,
    )
    rows = len(batch.meta.slots)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim, generator=rng).to(dtype)
    angles = torch.rand(200, dim // 2, generator=rng) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    results = []
    for write in (native(isa).rope_kv_write, rope_kv_write):
        fused, keys, values = qkv.clone(), batch.k_cache.clone(), batch.v_cache.clone()
        q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
        write(q, k, v, cos_sin, batch.meta, keys, values)
        results.append((fused, keys, values))
    for actual, expected in zip(*results, strict=True):
        # Slots that belong to no token keep their NaN: nothing was written beside the batch.
        assert torch.equal(actual.isnan(), expected.isnan())
        close(actual.nan_to_num(), expected.nan_to_num())
