"""Native paged attention against the reference, on every ISA."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, ISAS, close, native, paged_batch

from kernels.reference.attention import attention

# (queries, context) of each sequence, blocks of 8 tokens: a first token, full blocks, one over.
DECODE = [(1, 1), (1, 8), (1, 9), (1, 130), (1, 71)]
PREFILL = [(8, 8), (1, 1), (9, 9), (150, 150)]
CHUNKS = [(5, 70), (64, 128), (1, 33), (2, 2), (100, 163), (1, 64)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens", [DECODE, PREFILL, CHUNKS], ids=["decode", "prefill", "chunks"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 32), (5, 1, 80), (8, 2, 18), (2, 1, 128)]
)
def test_attention(
    isa: str,
    dtype: torch.dtype,
    lens: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    rng: torch.Generator,
) -> None:
    batch = paged_batch(rng, lens, kv_heads=kv_heads, head_dim=dim, block_tokens=8, dtype=dtype)
    rows = len(batch.meta.slots)
    # A slice of a wider tensor, as the model passes it: rows are apart.
    q = torch.randn(rows, heads + 2, dim, generator=rng).to(dtype)[:, :heads]
    caches = (batch.k_cache, batch.v_cache)
    close(
        native(isa).attention(q, *caches, batch.meta, dim**-0.5),
        attention(q, *caches, batch.meta, dim**-0.5),
    )


@pytest.mark.parametrize("block_tokens", [1, 3, 16])
def test_block_sizes(block_tokens: int, rng: torch.Generator) -> None:
    ops = native("portable")
    batch = paged_batch(
        rng,
        [(1, 40), (10, 50), (1, 1)],
        kv_heads=2,
        head_dim=16,
        block_tokens=block_tokens,
        dtype=torch.float32,
    )
    q = torch.randn(12, 4, 16, generator=rng)
    caches = (batch.k_cache, batch.v_cache)
    close(ops.attention(q, *caches, batch.meta, 0.25), attention(q, *caches, batch.meta, 0.25))


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_scores_stay_finite(isa: str, rng: torch.Generator) -> None:
    lens = [(1, 90), (20, 90)]
    batch = paged_batch(rng, lens, kv_heads=1, head_dim=16, block_tokens=8, dtype=torch.float32)
    q = 1e4 * torch.randn(21, 2, 16, generator=rng)
    caches = (batch.k_cache, batch.v_cache)
    close(
        native(isa).attention(q, *caches, batch.meta, 1.0),
        attention(q, *caches, batch.meta, 1.0),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("lens", [(1, 30), (12, 30)], ids=["decode", "chunk"])
def test_nan_in_the_cache_is_not_hidden(
    isa: str, lens: tuple[int, int], rng: torch.Generator
) -> None:
    batch = paged_batch(rng, [lens], kv_heads=1, head_dim=16, block_tokens=8, dtype=torch.bfloat16)
    batch.k_cache[int(batch.meta.block_tables[0, 0]), 3] = float("nan")
    q = torch.randn(lens[0], 2, 16, generator=rng).bfloat16()
    out = native(isa).attention(q, batch.k_cache, batch.v_cache, batch.meta, 0.25)
    assert out.isnan().all()


def test_layout_is_checked(rng: torch.Generator) -> None:
    batch = paged_batch(rng, [(1, 4)], kv_heads=2, head_dim=16, block_tokens=8, dtype=torch.float32)
    ops = native("portable")
    with pytest.raises(ValueError, match="do not fit"):
        ops.attention(torch.zeros(1, 3, 16), batch.k_cache, batch.v_cache, batch.meta, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        ops.attention(
            torch.zeros(1, 4, 16),
            batch.k_cache.transpose(0, 1),
            batch.v_cache.transpose(0, 1),
            batch.meta,
            1.0,
        )
