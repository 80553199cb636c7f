"""Rotary position embedding, with keys and values written to the paged cache in the same pass.

Element i of the first half of a head pairs with element i of the second half:
``(a, b) -> (a cos - b sin, b cos + a sin)`` in float32. ``q`` and ``k`` are rotated in place; k,
once rotated, and v go to the slots of their tokens.

A program takes one token and a few heads, of q, of k or of v. No sums: bits never depend on the
batch.

Source: Su et al., "RoFormer" (2021), section 3.4, in the layout of Hugging Face Llama weights.

Roofline: (2 Hq + 4 Hk + Hk) D elements per token moved, 3 FLOPs per rotated element: memory bound,
and at decode a matter of launch latency. Not measured on a device yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.meta import AttentionMeta
from kernels.triton.launch import Launch, ceil_div, power_of_2, require, rows_of_heads, same_dtype
from kernels.triton.overlap import await_turn

TILE_ELEMENTS = 1024
"""Elements of half heads in one program: 8 per thread of 4 warps, twice. Guess."""


@triton.jit
def rope_kv_write_kernel(
    q_ptr, k_ptr, v_ptr, cos_sin_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr,
    q_stride, k_stride, v_stride,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    await_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query_parts: tl.constexpr = (QUERY_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_parts: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    slot = tl.load(slots_ptr + token).to(tl.int64) * (KV_HEADS * 2 * HALF)
    if part >= query_parts + kv_parts:
        head += (part - query_parts - kv_parts) * BLOCK_HEADS
        held = (head < KV_HEADS) & (pair < HALF)
        at = head * (2 * HALF) + pair  # [BLOCK_HEADS, BLOCK_HALF]
        source = v_ptr + token * v_stride + at
        target = v_cache_ptr + slot + at
        tl.store(target, tl.load(source, mask=held), mask=held)
        tl.store(target + HALF, tl.load(source + HALF, mask=held), mask=held)
    else:
        position = tl.load(positions_ptr + token).to(tl.int64)
        angle = cos_sin_ptr + position * (2 * HALF) + pair
        cos = tl.load(angle, mask=pair < HALF, other=0.0)  # [1, BLOCK_HALF]
        sin = tl.load(angle + HALF, mask=pair < HALF, other=0.0)  # [1, BLOCK_HALF]
        if part < query_parts:
            head += part * BLOCK_HEADS
            held = (head < QUERY_HEADS) & (pair < HALF)
            line = q_ptr + token * q_stride + head * (2 * HALF) + pair
        else:
            head += (part - query_parts) * BLOCK_HEADS
            held = (head < KV_HEADS) & (pair < HALF)
            line = k_ptr + token * k_stride + head * (2 * HALF) + pair
        a = tl.load(line, mask=held, other=0.0).to(tl.float32)  # [BLOCK_HEADS, BLOCK_HALF]
        b = tl.load(line + HALF, mask=held, other=0.0).to(tl.float32)
        first = (a * cos - b * sin).to(q_ptr.dtype.element_ty)
        second = (b * cos + a * sin).to(q_ptr.dtype.element_ty)
        tl.store(line, first, mask=held)
        tl.store(line + HALF, second, mask=held)
        if part >= query_parts:
            target = k_cache_ptr + slot + head * (2 * HALF) + pair
            tl.store(target, first, mask=held)
            tl.store(target + HALF, second, mask=held)


def plan_rope_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    meta: AttentionMeta,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> Launch:
    """Arguments as in ``kernels.reference.rope.rope_kv_write``.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    rows, query_heads, width = q.shape
    kv_heads = k.shape[1]
    require(
        same_dtype(q, k, v, k_cache, v_cache)
        and all(map(rows_of_heads, (q, k, v)))
        and k.shape == v.shape == (rows, kv_heads, width)
        and width % 2 == 0
        and k_cache.shape[2:] == v_cache.shape[2:] == k.shape[1:]
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and cos_sin.is_contiguous()
        and cos_sin.shape[1] == width
        and cos_sin.dtype is torch.float32
        and meta.positions.shape[0] == meta.slots.shape[0] == rows,
        "rope_kv_write",
        *(q, k, v, cos_sin, k_cache, v_cache),
    )
    half = width // 2
    block_half = power_of_2(half)
    block_heads = max(1, min(TILE_ELEMENTS // block_half, power_of_2(query_heads)))
    parts = ceil_div(query_heads, block_heads) + 2 * ceil_div(kv_heads, block_heads)
    return Launch(
        rope_kv_write_kernel,
        (rows, parts),
        {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "cos_sin_ptr": cos_sin,
            "positions_ptr": meta.positions,
            "slots_ptr": meta.slots,
            "k_cache_ptr": k_cache,
            "v_cache_ptr": v_cache,
            "q_stride": q.stride(0),
            "k_stride": k.stride(0),
            "v_stride": v.stride(0),
        },
        {
            "QUERY_HEADS": query_heads,
            "KV_HEADS": kv_heads,
            "HALF": half,
            "BLOCK_HEADS": block_heads,
            "BLOCK_HALF": block_half,
        },
    )


def rope_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    meta: AttentionMeta,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    overlap: bool = False,
) -> None:
    """See ``kernels.reference.rope.rope_kv_write``."""
    plan_rope_kv_write(q, k, v, cos_sin, meta, k_cache, v_cache).run(overlap=overlap)
