"""Row-wise Triton kernels against the reference: norms, gate, rotation with the KV write."""

from __future__ import annotations

import pytest
import torch
from interpreted_cases import DTYPES, close
from kernel_cases import paged_batch

from kernels.reference import activation as reference_activation
from kernels.reference import norm as reference_norm
from kernels.reference import rope as reference_rope
from kernels.triton.activation import silu_mul
from kernels.triton.norm import MAX_HIDDEN, add_rms_norm, rms_norm
from kernels.triton.rope import rope_kv_write

pytestmark = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize(("rows", "hidden"), [(0, 64), (1, 1), (3, 63), (7, 111), (4, 576)])
def test_rms_norm(rows: int, hidden: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    x = (3 * torch.randn(rows, hidden, generator=rng)).to(dtype)
    weight = torch.randn(hidden, generator=rng).to(dtype)
    close(rms_norm(x, weight, 1e-5), reference_norm.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 63), (5, 576)])
def test_add_rms_norm(rows: int, hidden: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    x, residual = torch.randn(2, rows, hidden, generator=rng).to(dtype).unbind()
    weight = torch.randn(hidden, generator=rng).to(dtype)
    out, total = add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = reference_norm.add_rms_norm(x, residual, weight, 1e-5)
    close(total, expected_total)
    if dtype is not torch.bfloat16:  # one addition, one rounding; the interpreter cuts bfloat16 off
        assert torch.equal(total, expected_total)
    close(out, expected)


def test_a_norm_of_rows_that_lie_apart(dtype: torch.dtype, rng: torch.Generator) -> None:
    x = torch.randn(4, 100, generator=rng).to(dtype)[:, 5:68]
    weight = torch.ones(63, dtype=dtype)
    close(rms_norm(x, weight, 1e-6), reference_norm.rms_norm(x, weight, 1e-6))


def test_zeros_are_normalised_to_zeros(dtype: torch.dtype) -> None:
    assert not rms_norm(torch.zeros(2, 70, dtype=dtype), torch.ones(70, dtype=dtype), 1e-5).any()


def test_what_does_not_fit_a_norm_is_refused(dtype: torch.dtype) -> None:
    x, weight = torch.ones(2, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    for bad in (torch.ones(7, dtype=dtype), weight.double()):
        with pytest.raises(ValueError, match="rms_norm"):
            rms_norm(x, bad, 1e-5)
    with pytest.raises(ValueError, match="rms_norm"):
        add_rms_norm(x, x[:1], weight, 1e-5)
    long = torch.ones(1, MAX_HIDDEN + 1, dtype=dtype)
    with pytest.raises(ValueError, match="rms_norm"):
        rms_norm(long, long[0], 1e-5)


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 63), (2, 1536), (2, 2100)])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    gate_up = torch.randn(rows, 2 * width, generator=rng).to(dtype)
    close(silu_mul(gate_up), reference_activation.silu_mul(gate_up))


def test_gates_far_from_zero(dtype: torch.dtype) -> None:
    gate_up = torch.ones(1, 8, dtype=dtype)
    gate_up[0, :4] = torch.tensor([-1000.0, -90.0, 90.0, 1000.0])
    close(silu_mul(gate_up), reference_activation.silu_mul(gate_up))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(9, 3, 64), (2, 2, 6), (8, 1, 80), (32, 4, 128), (1, 1, 2)],
)
def test_rope_kv_write(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    batch = paged_batch(
        rng,
        [(3, 40), (1, 17), (0, 5), (5, 5)],
        kv_heads=kv_heads,
        head_dim=dim,
        block_tokens=7,
        dtype=dtype,
    )
    qkv = torch.randn(9, heads + 2 * kv_heads, dim, generator=rng).to(dtype)
    angles = torch.rand(64, dim // 2, generator=rng) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    results = []
    for write in (rope_kv_write, reference_rope.rope_kv_write):
        fused, keys, values = qkv.clone(), batch.k_cache.clone(), batch.v_cache.clone()
        q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
        write(q, k, v, cos_sin, batch.meta, keys, values)
        results.append((fused, keys, values))
    for actual, expected in zip(*results, strict=True):
        # Slots that belong to no token keep their NaN: nothing was written beside the batch.
        assert torch.equal(actual.isnan(), expected.isnan())
        close(actual.nan_to_num(), expected.nan_to_num())


def test_a_cache_of_another_shape_is_refused(dtype: torch.dtype, rng: torch.Generator) -> None:
    batch = paged_batch(rng, [(1, 3)], kv_heads=2, head_dim=4, block_tokens=4, dtype=dtype)
    q, k, v = torch.ones(1, 6, 4, dtype=dtype).split([2, 2, 2], dim=1)
    with pytest.raises(ValueError, match="rope_kv_write"):
        rope_kv_write(q, k, v, torch.ones(3, 4), batch.meta, batch.k_cache[..., :2], batch.v_cache)
