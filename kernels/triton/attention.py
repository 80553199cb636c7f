"""Causal attention of a ragged batch over a paged KV cache; see ``kernels.reference.attention``.

    out = softmax(scale q k^T + mask) v

Scores and sums are float32, products are of the inputs' dtype. The softmax is folded over tiles of
keys: with the largest score so far m, the sum of weights t and the weighted sum of values a,

    m' = max(m, max s)    w = 2^(s - m')    t' = t 2^(m - m') + sum w    a' = a 2^(m - m') + w v

where s holds scores times log2 e. A tile of queries is BLOCK_M rows: the heads that share a KV head
(GROUP of them) of some consecutive queries, so that K and V are read once for all of them. Tiles of
keys begin at multiples of BLOCK_N, wherever the queries lie.

One kernel, two uses. Long queries (prefill chunks): wide tiles, one program per tile and KV head.
Short ones (decode, a few speculated tokens): narrow tiles, and the keys of a sequence are split
among programs, whose (m, t, a) a second kernel merges in order. How many splits follows from the
numbers of keys and programs and the device's multiprocessors.

Batch invariance: all queries take the wide tiles without splits, and every tile of keys is masked,
because a compiler may round the two loops differently. Keys that a row does not see add exact
zeros, so its bits depend on the keys it sees alone.

Source: Dao, "FlashAttention-2" (2023), section 3.1; Milakov and Gimelshein, "Online normalizer
calculation for softmax" (2018); for splits: Dao et al., "Flash-Decoding for long-context
inference" (2023).

Roofline: prefill 4 T Hq D (visible keys) FLOPs, compute bound; decode reads 2 Hk D elements per key
(4 Hk D bytes in bfloat16) at 2 GROUP FLOPs per byte, memory bound. Not measured on a device yet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.meta import AttentionMeta
from kernels.triton.attention_tiles import Tiles, narrow_tiles, split_tokens, wide_tiles
from kernels.triton.launch import Launch, ceil_div, power_of_2, require, rows_of_heads, same_dtype
from kernels.triton.overlap import await_turn

EVERYTHING = 1 << 30
"""A window or chunk that no context fills."""


@triton.jit
def fold_keys(
    a, t, m, q, start, first, end, position, lowest,
    k_ptr, v_ptr, table_ptr, scale,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the keys [start, start + BLOCK_N) into (a [M, D], t [M], m [M]).

    ``first`` and ``end``: keys that some row of the tile sees; others are not read. A row sees
    those in [lowest [M], position [M]].
    """
    key = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    read = (key >= first) & (key < end)
    if MASKED:
        block = tl.load(table_ptr + key // BLOCK_TOKENS, mask=read, other=0).to(tl.int64)
    else:
        block = tl.load(table_ptr + key // BLOCK_TOKENS).to(tl.int64)  # [N]
    offset = (block * BLOCK_TOKENS + key % BLOCK_TOKENS) * (KV_HEADS * WIDTH)
    k_at = k_ptr + offset[None, :] + d[:, None]
    v_at = v_ptr + offset[:, None] + d[None, :]
    if MASKED:
        k = tl.load(k_at, mask=read[None, :] & (d < WIDTH)[:, None], other=0.0)  # [D, N]
        v = tl.load(v_at, mask=read[:, None] & (d < WIDTH)[None, :], other=0.0)  # [N, D]
    elif BLOCK_D == WIDTH:
        k = tl.load(k_at)
        v = tl.load(v_at)
    else:
        k = tl.load(k_at, mask=(d < WIDTH)[:, None], other=0.0)
        v = tl.load(v_at, mask=(d < WIDTH)[None, :], other=0.0)
    s = tl.dot(q, k, input_precision="ieee") * scale  # [M, N]
    if MASKED:
        seen = (key[None, :] <= position[:, None]) & (key[None, :] >= lowest[:, None])
        s = tl.where(seen, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, axis=1))
    # A row that has seen nothing yet keeps m = -inf; -inf - -inf would be NaN.
    anchor = tl.where(top == float("-inf"), 0.0, top)
    w = tl.exp2(s - anchor[:, None])
    shrink = tl.exp2(m - anchor)
    t = t * shrink + tl.sum(w, axis=1)
    a = tl.dot(w.to(v.dtype), v, a * shrink[:, None], input_precision="ieee")
    return a, t, top


@triton.jit(
    do_not_specialize=["table_stride", "sequences", "short", "split_tokens", "window", "chunk"]
)
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, a_ptr, tm_ptr, starts_ptr, contexts_ptr, tables_ptr,
    q_stride, table_stride, sequences, short, split_tokens, scale, window, chunk,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NARROW: tl.constexpr, SPLIT: tl.constexpr, ALL_MASKED: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    await_turn(OVERLAP)
    per_tile: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if NARROW:
        sequence = tile
    else:
        # Sequence i owns the tiles from starts[i] // per_tile + i on, enough for any alignment: the
        # last whose first tile is not behind this one.
        sequence = 0
        behind = sequences
        while behind - sequence > 1:
            middle = (sequence + behind) // 2
            own = tl.load(starts_ptr + middle) // per_tile + middle <= tile
            sequence = tl.where(own, middle, sequence)
            behind = tl.where(own, behind, middle)
    begin = tl.load(starts_ptr + sequence)
    queries = tl.load(starts_ptr + sequence + 1) - begin
    context = tl.load(contexts_ptr + sequence)
    if NARROW:
        at = 0
        mine = (queries > 0) & (queries <= short)
    else:
        at = (tile - (begin // per_tile + sequence)) * per_tile
        mine = (at < queries) & (queries > short)
    if mine:
        row = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        query = at + row // GROUP
        head = kv_head * GROUP + row % GROUP
        real = (row < per_tile * GROUP) & (query < queries)
        q_at = q_ptr + (begin + query).to(tl.int64) * q_stride + head * WIDTH  # [M]
        held = real[:, None] & (d < WIDTH)[None, :]
        q = tl.load(q_at[:, None] + d[None, :], mask=held, other=0.0)  # [M, D]
        position = context - queries + query
        lowest = tl.maximum(position - window + 1, position // chunk * chunk)
        # Keys that the tile's first query, or any after it, sees.
        foremost = context - queries + at
        first = tl.maximum(foremost - window + 1, foremost // chunk * chunk)
        first = tl.maximum(first, 0)
        end = tl.minimum(foremost + per_tile, context)
        start = first // BLOCK_N * BLOCK_N
        stop = end
        if SPLIT:
            start += split * split_tokens
            stop = tl.minimum(end, start + split_tokens)
        # Keys below this are seen by every row.
        whole = start
        if not ALL_MASKED:
            whole = tl.maximum(tl.minimum(foremost + 1, stop) // BLOCK_N * BLOCK_N, start)
        a = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        t = tl.zeros((BLOCK_M,), dtype=tl.float32)
        m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        table = tables_ptr + sequence.to(tl.int64) * table_stride
        k_head = k_ptr + kv_head * WIDTH
        v_head = v_ptr + kv_head * WIDTH
        if not ALL_MASKED:
            for here in range(start, whole, BLOCK_N):
                a, t, m = fold_keys(
                    a, t, m, q, here, first, end, position, lowest, k_head, v_head, table, scale,
                    KV_HEADS, WIDTH, BLOCK_D, BLOCK_TOKENS, BLOCK_N, MASKED=False,
                )  # fmt: skip
        for here in range(whole, stop, BLOCK_N):
            a, t, m = fold_keys(
                a, t, m, q, here, first, end, position, lowest, k_head, v_head, table, scale,
                KV_HEADS, WIDTH, BLOCK_D, BLOCK_TOKENS, BLOCK_N, MASKED=True,
            )  # fmt: skip
        if SPLIT:
            part = ((split.to(tl.int64) * sequences + sequence) * short + query) * (
                KV_HEADS * GROUP
            ) + head  # [M]
            tl.store(a_ptr + part[:, None] * WIDTH + d[None, :], a, mask=held)
            tl.store(tm_ptr + 2 * part, t, mask=real)
            tl.store(tm_ptr + 2 * part + 1, m, mask=real)
        else:
            line = (begin + query).to(tl.int64) * (KV_HEADS * GROUP) + head
            # Rows behind the last query may have seen no key; nothing of them is stored.
            o = (a / tl.where(t > 0, t, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + line[:, None] * WIDTH + d[None, :], o, mask=held)


@triton.jit(do_not_specialize=["sequences", "short", "splits"])
def merge_kernel(
    a_ptr, tm_ptr, out_ptr, starts_ptr, sequences, short, splits,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """One row of the result from its partial ones, in order of the keys."""
    await_turn(OVERLAP)
    sequence = tl.program_id(0) // short
    query = tl.program_id(0) % short
    head = tl.program_id(1)
    begin = tl.load(starts_ptr + sequence)
    queries = tl.load(starts_ptr + sequence + 1) - begin
    if (query < queries) & (queries <= short):
        split = tl.arange(0, BLOCK_S)
        d = tl.arange(0, BLOCK_D)
        there = split < splits
        part = ((split.to(tl.int64) * sequences + sequence) * short + query) * HEADS + head  # [S]
        m = tl.load(tm_ptr + 2 * part + 1, mask=there, other=float("-inf"))
        t = tl.load(tm_ptr + 2 * part, mask=there, other=0.0)
        share = tl.exp2(m - tl.max(m, axis=0))  # every query sees itself: the maximum is finite
        held = there[:, None] & (d < WIDTH)[None, :]
        a = tl.load(a_ptr + part[:, None] * WIDTH + d[None, :], mask=held, other=0.0)  # [S, D]
        o = tl.sum(a * share[:, None], axis=0) / tl.sum(t * share, axis=0)
        line = (begin + query).to(tl.int64) * HEADS + head
        tl.store(out_ptr + line * WIDTH + d, o.to(out_ptr.dtype.element_ty), mask=d < WIDTH)


def plan_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    meta: AttentionMeta,
    scale: float,
    out: torch.Tensor,
    *,
    window: int | None,
    chunk: int | None,
    multiprocessors: int,
    batch_invariant: bool,
    wide: Tiles | None = None,
    narrow: Tiles | None = None,
) -> list[Launch]:
    """Up to three launches: long queries, short ones, and the merge of the latter's splits.

    Args:
        out: [T, Hq, D], contiguous.
        multiprocessors: of the device.
        wide: tiles of long queries, where not ``wide_tiles``; ``narrow`` alike, of short ones.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit, or a reach is below 1.
    """
    rows, heads, width = q.shape
    _, block_tokens, kv_heads, _ = k_cache.shape
    tables = meta.block_tables
    require(
        same_dtype(q, k_cache, v_cache)
        and rows_of_heads(q)
        and k_cache.shape == v_cache.shape
        and k_cache.shape[3] == width
        and heads % kv_heads == 0
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and out.is_contiguous()
        and tables.stride(1) == 1
        and meta.block_tokens == block_tokens,
        "attention",
        *(q, k_cache, v_cache, tables),
    )
    if min(window or 1, chunk or 1) < 1 or 0 in (window, chunk):
        raise ValueError(f"attention: window {window} and chunk {chunk} must be at least 1")
    group = heads // kv_heads
    wide = wide or wide_tiles(q.element_size(), group, width)
    narrow = narrow or narrow_tiles(q.element_size(), group, width)
    lens = meta.query_lens_host
    sequences = len(lens)
    most = 0 if batch_invariant else narrow.block_m // group
    short = max((n for n in lens if n <= most), default=0)
    arguments: dict[str, torch.Tensor | int | float] = {
        "q_ptr": q,
        "k_ptr": k_cache,
        "v_ptr": v_cache,
        "out_ptr": out,
        "a_ptr": out,
        "tm_ptr": out,
        "starts_ptr": meta.query_starts,
        "contexts_ptr": meta.context_lens,
        "tables_ptr": tables,
        "q_stride": q.stride(0),
        "table_stride": tables.stride(0),
        "sequences": sequences,
        "short": short,
        "split_tokens": 0,
        "scale": scale * math.log2(math.e),
        "window": min(window or EVERYTHING, EVERYTHING),
        "chunk": min(chunk or EVERYTHING, EVERYTHING),
    }
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "WIDTH": width,
        "BLOCK_D": max(16, power_of_2(width)),
        "BLOCK_TOKENS": block_tokens,
        "SPLIT": False,
        "ALL_MASKED": batch_invariant or window is not None or chunk is not None,
    }
    launches = []
    if max(lens, default=0) > short:
        launches.append(
            Launch(
                attention_kernel,
                (rows // (wide.block_m // group) + sequences, kv_heads, 1),
                arguments,
                constants | {"BLOCK_M": wide.block_m, "BLOCK_N": wide.block_n, "NARROW": False},
                wide.warps,
                wide.stages,
            )
        )
    if short == 0:
        return launches
    # A window begins anywhere within a tile of keys.
    reach = min(window or EVERYTHING, chunk or EVERYTHING) + short + narrow.block_n
    visible = min(meta.max_context, reach)
    of_split = split_tokens(visible, sequences * kv_heads, multiprocessors, narrow.block_n)
    splits = ceil_div(visible, of_split)
    parts = (splits, sequences, short, heads)
    if splits > 1:
        a = q.new_empty(*parts, width, dtype=torch.float32)
        tm = q.new_empty(*parts, 2, dtype=torch.float32)
        arguments = arguments | {"a_ptr": a, "tm_ptr": tm, "split_tokens": of_split}
        constants = constants | {"SPLIT": True}
    launches.append(
        Launch(
            attention_kernel,
            (sequences, kv_heads, splits),
            arguments,
            constants | {"BLOCK_M": narrow.block_m, "BLOCK_N": narrow.block_n, "NARROW": True},
            narrow.warps,
            narrow.stages,
        )
    )
    if splits > 1:
        names = ("a_ptr", "tm_ptr", "out_ptr", "starts_ptr", "sequences", "short")
        block_s = power_of_2(splits)
        launches.append(
            Launch(
                merge_kernel,
                (sequences * short, heads),
                {name: arguments[name] for name in names} | {"splits": splits},
                {
                    "HEADS": heads,
                    "WIDTH": width,
                    "BLOCK_D": constants["BLOCK_D"],
                    "BLOCK_S": block_s,
                },
                warps=8 if block_s * width > 8192 else 4,
            )
        )
    return launches


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    meta: AttentionMeta,
    scale: float,
    *,
    window: int | None = None,
    chunk: int | None = None,
    multiprocessors: int,
    batch_invariant: bool = False,
    overlap: bool = False,
) -> torch.Tensor:
    """See ``kernels.reference.attention.attention`` and ``plan_attention``."""
    out = q.new_empty(q.shape)
    for launch in plan_attention(
        q,
        k_cache,
        v_cache,
        meta,
        scale,
        out,
        window=window,
        chunk=chunk,
        multiprocessors=multiprocessors,
        batch_invariant=batch_invariant,
    ):
        launch.run(overlap=overlap)
    return out
