"""Triton's paged attention against the reference: both kernels, splits and their merge, reach."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted_cases import DOT_DTYPES, close, matmul_in_one_order
from kernel_cases import PagedBatch, paged_batch, place, random_kv

from kernels.reference import attention as reference
from kernels.triton.attention import attention, attention_kernel, merge_kernel, plan_attention
from kernels.triton.attention_tiles import MAX_SPLITS, MIN_SPLIT_TOKENS, Tiles, split_tokens
from kernels.triton.launch import Launch, ceil_div

# Many small tiles in few tokens, which the tiles of real launches would swallow whole.
WIDE, NARROW = Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 2)

SHAPES = [(3, 3, 64), (9, 3, 64), (8, 1, 128), (4, 2, 6), (5, 1, 80)]


def queries_of(
    batch: PagedBatch, heads: int, rng: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    """Queries as a slice of fused QKV, as the model hands them over: [T, heads, D]."""
    rows, width = sum(batch.meta.query_lens_host), batch.k_cache.shape[3]
    return torch.randn(rows, heads + 3, width, generator=rng).to(dtype)[:, :heads]


def check(
    batch: PagedBatch,
    q: torch.Tensor,
    *,
    window: int | None = None,
    chunk: int | None = None,
    multiprocessors: int = 1,
    batch_invariant: bool = False,
    tiles: bool = True,
) -> list[object]:
    """Compare with the reference; the kernels launched."""
    scale = q.shape[2] ** -0.5
    out = torch.empty(q.shape, dtype=q.dtype)
    launches = plan_attention(
        q,
        batch.k_cache,
        batch.v_cache,
        batch.meta,
        scale,
        out,
        window=window,
        chunk=chunk,
        multiprocessors=multiprocessors,
        batch_invariant=batch_invariant,
        wide=WIDE if tiles else None,
        narrow=NARROW if tiles else None,
    )
    for launch in launches:
        launch.run()
    caches = (batch.k_cache, batch.v_cache)
    close(
        out,
        reference.attention(q, *caches, batch.meta, scale, window=window, chunk=chunk),
    )
    return [launch.kernel for launch in launches]


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_a_mixed_batch(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    lens = [(40, 40), (1, 1), (0, 9), (1, 50), (33, 70), (1, 16), (2, 17), (0, 0)]
    batch = paged_batch(rng, lens, kv_heads=kv_heads, head_dim=dim, block_tokens=5, dtype=dtype)
    q = queries_of(batch, heads, rng, dtype)
    assert check(batch, q) == [attention_kernel] * 2


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (8, 1, 128), (2, 2, 64)])
def test_the_tiles_of_real_launches(
    heads: int, kv_heads: int, dim: int, rng: torch.Generator
) -> None:
    lens, dtype = [(140, 140), (1, 130), (40, 90)], torch.float16
    batch = paged_batch(rng, lens, kv_heads=kv_heads, head_dim=dim, block_tokens=16, dtype=dtype)
    check(batch, queries_of(batch, heads, rng, dtype), tiles=False)


@pytest.mark.parametrize("block_tokens", [1, 16, 100])
def test_full_empty_and_one_token_blocks(block_tokens: int, rng: torch.Generator) -> None:
    lens = [(1, block_tokens), (1, block_tokens + 1), (block_tokens, 2 * block_tokens)]
    batch = paged_batch(
        rng, lens, kv_heads=2, head_dim=16, block_tokens=block_tokens, dtype=torch.float32
    )
    check(batch, queries_of(batch, 4, rng, torch.float32))


def test_long_context_in_small_blocks_is_split_and_merged(rng: torch.Generator) -> None:
    lens = [(1, 1500), (1, 300), (1, 1), (3, 1499), (0, 40)]
    batch = paged_batch(rng, lens, kv_heads=1, head_dim=64, block_tokens=2, dtype=torch.float32)
    q = queries_of(batch, 3, rng, torch.float32)
    kernels = check(batch, q, multiprocessors=20)
    assert kernels == [attention_kernel, merge_kernel]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("window", "chunk"),
    [(1, None), (7, None), (16, None), (64, None), (None, 1), (None, 24), (None, 500), (20, 24)],
)
def test_windows_and_chunks(
    window: int | None, chunk: int | None, batch_invariant: bool, rng: torch.Generator
) -> None:
    lens = [(40, 40), (1, 77), (20, 55), (5, 50), (1, 1)]
    batch = paged_batch(rng, lens, kv_heads=2, head_dim=16, block_tokens=4, dtype=torch.float32)
    q = queries_of(batch, 6, rng, torch.float32)
    check(batch, q, window=window, chunk=chunk, batch_invariant=batch_invariant)


def test_a_window_over_a_long_context_is_split_within_the_window(rng: torch.Generator) -> None:
    lens = [(1, 1300), (1, 900)]
    batch = paged_batch(rng, lens, kv_heads=1, head_dim=16, block_tokens=16, dtype=torch.float32)
    q = queries_of(batch, 2, rng, torch.float32)
    assert merge_kernel in check(batch, q, window=600, multiprocessors=8)
    assert merge_kernel not in check(batch, q, window=100, multiprocessors=8)


def test_blocks_behind_the_window_are_never_read(rng: torch.Generator) -> None:
    batch = paged_batch(
        rng, [(30, 90), (1, 90)], kv_heads=1, head_dim=16, block_tokens=4, dtype=torch.float32
    )
    q = queries_of(batch, 2, rng, torch.float32)
    expected = reference.attention(q, batch.k_cache, batch.v_cache, batch.meta, 0.25, window=12)
    # Given back and reused by somebody: NaN in the caches, numbers of no block in the tables.
    tables = batch.meta.block_tables.clone()
    for row, first in enumerate((90 - 30 - 12 + 1, 90 - 12)):
        freed = tables[row, : first // 4].long()
        batch.k_cache[freed] = batch.v_cache[freed] = float("nan")
        tables[row, : first // 4] = 1 << 30
    meta = dataclasses.replace(batch.meta, block_tables=tables)
    caches = (batch.k_cache, batch.v_cache)
    close(attention(q, *caches, meta, 0.25, window=12, multiprocessors=4), expected)


@settings(max_examples=12)
@given(
    lens=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 60)).map(lambda n: (n[0], n[0] + n[1])),
        min_size=1,
        max_size=5,
    ),
    block_tokens=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (16, 1)]),
    window=st.none() | st.integers(1, 70),
    chunk=st.none() | st.integers(1, 70),
    multiprocessors=st.integers(1, 200),
    batch_invariant=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_batch(
    lens: list[tuple[int, int]],
    block_tokens: int,
    heads: tuple[int, int],
    window: int | None,
    chunk: int | None,
    multiprocessors: int,
    batch_invariant: bool,
    seed: int,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    batch = paged_batch(
        rng, lens, kv_heads=heads[1], head_dim=8, block_tokens=block_tokens, dtype=torch.float32
    )
    check(
        batch,
        queries_of(batch, heads[0], rng, torch.float32),
        window=window,
        chunk=chunk,
        multiprocessors=multiprocessors,
        batch_invariant=batch_invariant,
    )


def test_invariant_rows_have_the_same_bits_by_decode_by_chunks_and_beside_others(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "matmul", matmul_in_one_order)
    tokens, heads = 90, 2
    content = random_kv(rng, tokens, 1, 16, torch.float32)
    q = torch.randn(tokens, heads, 16, generator=rng)

    def attend(first: int, end: int, block_tokens: int) -> torch.Tensor:
        batch = place(rng, [content[:, :end]], [end - first], block_tokens)
        caches = (batch.k_cache, batch.v_cache)
        return attention(
            q[first:end], *caches, batch.meta, 0.25, multiprocessors=7, batch_invariant=True
        )

    whole = attend(0, tokens, 16)
    for at in range(0, tokens, 11):
        assert torch.equal(attend(at, at + 1, 1 + at % 5), whole[at : at + 1])
    for size in (13, 80):
        for first in range(0, tokens, size):
            end = min(first + size, tokens)
            assert torch.equal(attend(first, end, 16), whole[first:end])
    stranger = random_kv(rng, 30, 1, 16, torch.float32)
    batch = place(rng, [stranger, content, content[:, :50]], [30, 20, 1], 3)
    rows = torch.cat((torch.randn(30, heads, 16, generator=rng), q[70:90], q[49:50]))
    caches = (batch.k_cache, batch.v_cache)
    out = attention(rows, *caches, batch.meta, 0.25, multiprocessors=7, batch_invariant=True)
    assert torch.equal(out[30:], torch.cat((whole[70:90], whole[49:50])))


def test_splits_follow_the_keys_and_the_device() -> None:
    """Of an 8B model with 8 KV heads on an H200, whose programs run 396 at a time."""

    def splits(visible: int, programs: int) -> int:
        return ceil_div(visible, split_tokens(visible, programs, 132, 64))

    assert splits(1, 1) == splits(100, 1) == 1  # too few keys
    assert splits(8192, 8) == 32  # one sequence: all keys, 256 programs at once
    assert splits(32768, 8) == 47  # the device is full: 376 programs, and not 400 in two waves
    assert splits(8192, 8 * 8) == 6  # 384 programs; a seventh part would be a second wave
    assert splits(8192, 8 * 48) == 1  # a batch fills it
    assert splits(8192, 8 * 64) == 3  # 512 leave the second wave nearly empty, 1,536 fill four
    assert 0.95 * MAX_SPLITS <= splits(1 << 20, 1) <= MAX_SPLITS
    assert splits(MIN_SPLIT_TOKENS + 1, 1) == 2
    for visible in (1, 255, 257, 1000, 8191, 8192, 100_000):
        for programs in (1, 7, 8, 64, 512, 4096):
            size = split_tokens(visible, programs, 132, 64)
            assert size % 64 == 0
            assert splits(visible, programs) <= MAX_SPLITS
            assert size >= min(visible, MIN_SPLIT_TOKENS // 2)


@pytest.mark.parametrize("context", [300, 3000])
def test_short_queries_are_split_by_their_keys_unless_bits_are_to_be_the_same(
    context: int, rng: torch.Generator
) -> None:
    """What the interpreter cannot tell apart: it rounds alike in tiles of any kind."""
    lens = [(1, context), (1, 20)]
    batch = paged_batch(rng, lens, kv_heads=1, head_dim=16, block_tokens=16, dtype=torch.float32)
    q = queries_of(batch, 3, rng, torch.float32)

    def plan(*, batch_invariant: bool) -> list[Launch]:
        return plan_attention(
            *(q, batch.k_cache, batch.v_cache, batch.meta, 0.25, torch.empty(q.shape)),
            window=None,
            chunk=None,
            multiprocessors=20,
            batch_invariant=batch_invariant,
        )

    narrow = plan(batch_invariant=False)[0]
    size = split_tokens(context, 2, 20, narrow.constants["BLOCK_N"])
    assert narrow.constants["NARROW"]
    assert narrow.grid[2] == ceil_div(context, size)
    (wide,) = plan(batch_invariant=True)
    kind = [wide.constants[name] for name in ("NARROW", "SPLIT", "ALL_MASKED")]
    assert kind == [False, False, True]


def test_what_does_not_fit_is_refused(rng: torch.Generator) -> None:
    batch = paged_batch(rng, [(2, 9)], kv_heads=2, head_dim=8, block_tokens=4, dtype=torch.float32)
    caches = (batch.k_cache, batch.v_cache)
    q = queries_of(batch, 4, rng, torch.float32)
    for bad in (q[:, :3], q.half(), q[..., :4], q.double()):
        with pytest.raises(ValueError, match="attention"):
            attention(bad, *caches, batch.meta, 1.0, multiprocessors=1)
    for reach in ({"window": 0}, {"chunk": 0}, {"window": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            attention(q, *caches, batch.meta, 1.0, multiprocessors=1, **reach)
