"""A row's bits depend on that row alone: every operation, every backend and instruction set.

Each test computes the same rows in several surroundings and asks for equal bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from kernel_cases import DTYPES, ISAS, PagedBatch, close, native, place, random_kv

from kernels.native.ops import NativeOps
from kernels.ops import Ops, load_ops, reference_ops
from kernels.reference import invariant
from kernels.reference.activation import silu_mul
from kernels.reference.attention import attention
from kernels.reference.linear import linear
from kernels.reference.norm import rms_norm

KINDS = ("reference", *ISAS)
THREADS = (1, 2, 3)

pytestmark = pytest.mark.parametrize("dtype", DTYPES)


@contextmanager
def operations(kind: str, threads: int) -> Iterator[Ops | NativeOps]:
    """Batch-invariant operations on ``threads`` threads."""
    if kind != "reference":
        yield native(kind, threads)
        return
    torch.set_num_threads(threads)
    try:
        yield reference_ops(batch_invariant=True)
    finally:
        torch.set_num_threads(1)


def spans(rows: int) -> list[slice]:
    """Batches out of ``rows`` rows: every beginning up to 33, and pieces of the middle."""
    beginnings = [slice(0, n) for n in range(1, min(rows, 33) + 1)]
    return [*beginnings, *(slice(a, min(a + 7, rows)) for a in range(1, rows, 11))]


# (N, K): odd sizes that leave every kind of tail, those of a 135M model, and K of several blocks.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("columns", "depth"), [(3, 5), (65, 63), (130, 111), (96, 576), (70, 1536), (9, 2500)]
)
def test_linear_and_logits(
    kind: str, columns: int, depth: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    rows = 33 if kind == "reference" else 230
    x = torch.randn(rows, depth, generator=rng).to(dtype)
    w = (torch.randn(columns, depth, generator=rng) / depth**0.5).to(dtype)
    bias = torch.randn(columns, generator=rng).to(dtype)
    with operations(kind, 1) as ops:
        narrow, wide = ops.linear(x, w, bias), ops.logits(x, w)
    for threads in THREADS:
        with operations(kind, threads) as ops:
            assert torch.equal(ops.logits(x, w), wide)
            for span in spans(rows):
                assert torch.equal(ops.logits(x[span], w), wide[span])
                assert torch.equal(ops.linear(x[span], w, bias), narrow[span])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [1, 63, 576])
def test_norms_and_gate(kind: str, hidden: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    x, residual = torch.randn(2, 100, hidden, generator=rng).to(dtype).unbind()
    weight = torch.randn(hidden, generator=rng).to(dtype)
    gate_up = 4 * torch.randn(100, 2 * hidden, generator=rng).to(dtype)
    with operations(kind, 1) as ops:
        normed = ops.rms_norm(x, weight, 1e-5)
        added, total = ops.add_rms_norm(x, residual, weight, 1e-5)
        gated = ops.silu_mul(gate_up)
    for threads in THREADS:
        with operations(kind, threads) as ops:
            for span in [*spans(100), slice(0, 100)]:
                assert torch.equal(ops.rms_norm(x[span], weight, 1e-5), normed[span])
                again = ops.add_rms_norm(x[span], residual[span], weight, 1e-5)
                assert torch.equal(again[0], added[span])
                assert torch.equal(again[1], total[span])
                assert torch.equal(ops.silu_mul(gate_up[span]), gated[span])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (2, 2, 6), (8, 1, 80)])
def test_rope_kv_write(
    kind: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    tokens = 40
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=rng).to(dtype)
    angles = torch.rand(tokens, dim // 2, generator=rng) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    empty = torch.full((2, tokens, kv_heads, dim), float("nan"), dtype=dtype)

    def written(chunks: list[int], threads: int) -> tuple[torch.Tensor, ...]:
        """Rotated q, then K and V by position, of tokens that came in ``chunks``."""
        keys, values, queries, done = [], [], [], 0
        for count in chunks:
            done += count
            batch = place(rng, [empty[:, :done]], [count], 4)
            q, k, v = qkv[done - count : done].clone().split([heads, kv_heads, kv_heads], dim=1)
            with operations(kind, threads) as ops:
                ops.rope_kv_write(q, k, v, cos_sin, batch.meta, batch.k_cache, batch.v_cache)
            queries.append(q)
            keys.append(batch.k_cache.flatten(0, 1)[batch.meta.slots])
            values.append(batch.v_cache.flatten(0, 1)[batch.meta.slots])
        return torch.cat(queries), torch.cat(keys), torch.cat(values)

    whole = written([tokens], 1)
    for threads in THREADS:
        for chunks in ([1] * tokens, [7, 33], [16, 16, 8]):
            for actual, expected in zip(written(chunks, threads), whole, strict=True):
                assert torch.equal(actual, expected)


def attend(kind: str, threads: int, q: torch.Tensor, batch: PagedBatch, dim: int) -> torch.Tensor:
    with operations(kind, threads) as ops:
        return ops.attention(q, batch.k_cache, batch.v_cache, batch.meta, dim**-0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 32), (5, 1, 80), (8, 2, 18), (2, 1, 128)]
)
def test_attention_by_decode_by_any_chunks_and_beside_others(
    kind: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    tokens = 150
    content = random_kv(rng, tokens, kv_heads, dim, dtype)
    q = torch.randn(tokens, heads, dim, generator=rng).to(dtype)
    whole = attend(kind, 1, q, place(rng, [content], [tokens], 16), dim)

    def piece(first: int, end: int, threads: int, block_tokens: int) -> torch.Tensor:
        batch = place(rng, [content[:, :end]], [end - first], block_tokens)
        return attend(kind, threads, q[first:end], batch, dim)

    for at in range(tokens):  # decode, in blocks of odd sizes and shuffled places
        assert torch.equal(piece(at, at + 1, 1 + at % 2, (16, 1, 5)[at % 3]), whole[at : at + 1])
    for size in (7, 16, 64):  # chunked prefill
        for first in range(0, tokens, size):
            end = min(first + size, tokens)
            assert torch.equal(piece(first, end, 2, 16), whole[first:end])
    # A decode step, a chunk in the middle and a whole prompt in one batch, with strangers between.
    strangers = [random_kv(rng, n, kv_heads, dim, dtype) for n in (33, 200)]
    ends, news = [60, 33, 128, 200, 150], [1, 1, 40, 200, 150]
    contents = [content[:, :60], strangers[0], content[:, :128], strangers[1], content]
    other = torch.randn(200, heads, dim, generator=rng).to(dtype)
    rows = [
        (q if i in (0, 2, 4) else other)[end - new : end]
        for i, (end, new) in enumerate(zip(ends, news, strict=True))
    ]
    for threads in THREADS:
        batch = place(rng, contents, news, 16)
        pieces = attend(kind, threads, torch.cat(rows), batch, dim).split(news)
        for i in (0, 2, 4):
            assert torch.equal(pieces[i], whole[ends[i] - news[i] : ends[i]])


@pytest.mark.parametrize("kind", ISAS)
def test_attention_over_a_long_context(kind: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    tokens, heads, dim = 1100, 3, 64
    content = random_kv(rng, tokens, 1, dim, dtype)
    q = torch.randn(tokens, heads, dim, generator=rng).to(dtype)
    whole = attend(kind, 1, q, place(rng, [content], [tokens], 16), dim)
    for first, end in [(0, 512), (512, 1024), (1024, 1100), (300, 307), (999, 1000), (1099, 1100)]:
        batch = place(rng, [content[:, :end]], [end - first], 16)
        assert torch.equal(attend(kind, 2, q[first:end], batch, dim), whole[first:end])


def test_the_invariant_reference_agrees_with_the_readable_one(
    dtype: torch.dtype, rng: torch.Generator
) -> None:
    x = torch.randn(5, 111, generator=rng).to(dtype)
    w, bias = torch.randn(70, 111, generator=rng).to(dtype) / 10, torch.randn(70).to(dtype)
    close(invariant.linear(x, w, bias), linear(x, w, bias))
    close(invariant.rms_norm(x, w[0], 1e-5), rms_norm(x, w[0], 1e-5))
    wide = 40 * torch.randn(9, 222, generator=rng)
    wide[0, 0] = -200.0
    close(invariant.silu_mul(wide.to(dtype)), silu_mul(wide.to(dtype)))
    contents = [random_kv(rng, n, 2, 18, dtype) for n in (1, 40, 33)]
    batch = place(rng, contents, [1, 40, 5], 8)
    q = torch.randn(46, 6, 18, generator=rng).to(dtype)
    caches = (batch.k_cache, batch.v_cache)
    close(invariant.attention(q, *caches, batch.meta, 0.3), attention(q, *caches, batch.meta, 0.3))


def test_the_exponential_of_the_reference(dtype: torch.dtype) -> None:
    x = torch.linspace(-87, 88, 500_001).to(dtype).float()
    exact = x.double().exp()
    assert ((invariant.exp(x).double() - exact).abs() / exact).max() < 3e-7
    assert torch.equal(
        invariant.exp(torch.tensor([-88.0, -torch.inf, 0.0])), torch.tensor([0, 0, 1.0])
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_mode_shows_in_the_name(backend: str, dtype: torch.dtype) -> None:
    plain = load_ops(backend, 1).name  # type: ignore[arg-type]
    assert load_ops(backend, 1, batch_invariant=True).name == f"{plain}+batch_invariant"  # type: ignore[arg-type]
