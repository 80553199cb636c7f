"""Shared by the kernel tests: tolerances, shuffled block tables, the ISAs of this CPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kernels.meta import AttentionMeta
from kernels.native.build import ensure_library
from kernels.native.ops import NativeOps

# Allowed |native - reference| <= atol + rtol |reference|, for results of magnitude about 1.
# bfloat16 has 8 bits: one rounding is 2^-9 relative, and probabilities are rounded before the
# second product.
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.bfloat16: {"atol": 1e-2, "rtol": 1.6e-2},
}
DTYPES = list(TOLERANCE)
AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
NEEDS = {  # flags of a processor, as /proc/cpuinfo names them
    "avx512_bf16": ("avx2", "fma", *AVX512, "avx512_bf16"),
    "avx512": ("avx2", "fma", *AVX512),
    "avx2": ("avx2", "fma"),
    "portable": (),
}
ISAS = tuple(NEEDS)


@functools.cache
def processor_flags() -> frozenset[str]:
    """What this processor can do in the kernel's words; nothing where it has no such words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))


@functools.cache
def native(isa: str, threads: int = 2) -> NativeOps:
    """Native operations of one instruction set. Skips the test where this processor lacks it, and
    for no other reason: without a compiler, or with a library that does not run, it fails.
    """
    missing = [flag for flag in NEEDS[isa] if flag not in processor_flags()]
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    return NativeOps(ensure_library(), threads, isa)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert agreement within the table; NaN anywhere fails."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), **TOLERANCE[actual.dtype])


@dataclass(frozen=True)
class PagedBatch:
    """A batch over a cache whose unused slots are NaN: whoever reads one shows it."""

    meta: AttentionMeta
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def paged_batch(
    rng: torch.Generator,
    lens: list[tuple[int, int]],
    *,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
) -> PagedBatch:
    """A batch of sequences given as (query tokens, context tokens), blocks scattered over a pool.

    Every used slot holds random K and V, the ones of the query tokens included.
    """
    contents = [random_kv(rng, context, kv_heads, head_dim, dtype) for _, context in lens]
    return place(rng, contents, [queries for queries, _ in lens], block_tokens)


def random_kv(
    rng: torch.Generator, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """K and V of one sequence: [2, tokens, kv_heads, head_dim]."""
    return torch.randn(2, tokens, kv_heads, head_dim, generator=rng).to(dtype)


def place(
    rng: torch.Generator, contents: list[torch.Tensor], queries: list[int], block_tokens: int
) -> PagedBatch:
    """A batch over sequences whose K and V are given, in blocks scattered over a pool.

    The last ``queries[i]`` tokens of ``contents[i]`` are the queries of sequence i.
    """
    lens = [(new, content.shape[1]) for new, content in zip(queries, contents, strict=True)]
    needed = [-(-context // block_tokens) for _, context in lens]
    total = sum(needed) + 3
    free = torch.randperm(total, generator=rng).tolist()
    tables = torch.zeros(len(lens), max(needed) + 1, dtype=torch.int32)
    _, _, kv_heads, head_dim = contents[0].shape
    shape = (2, total, block_tokens, kv_heads, head_dim)
    caches = torch.full(shape, float("nan"), dtype=contents[0].dtype)
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for row, (new, context) in enumerate(lens):
        blocks = [free.pop() for _ in range(needed[row])]
        tables[row, : needed[row]] = torch.tensor(blocks, dtype=torch.int32)
        used = [blocks[p // block_tokens] * block_tokens + p % block_tokens for p in range(context)]
        caches.flatten(1, 2)[:, torch.tensor(used, dtype=torch.int64)] = contents[row]
        positions += range(context - new, context)
        slots += used[context - new :]
        starts.append(starts[-1] + new)
    meta = AttentionMeta(
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([c for _, c in lens], dtype=torch.int32),
        block_tables=tables,
        block_tokens=block_tokens,
        max_query=max(queries),
        max_context=max(c for _, c in lens),
        query_lens_host=queries,
        context_lens_host=[c for _, c in lens],
    )
    return PagedBatch(meta, caches[0], caches[1])
