"""KV of a span of tokens between the paged cache and one dense piece; see
``kernels.reference.kv_pack``.

A program moves some tokens of one layer, as integers as wide as a token's bytes allow.

Roofline: every byte is read and written once: memory bound on the device, and a fifth of a percent
of its bandwidth feeds a 100 Gbit/s link twice over. Not measured on a device yet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launch, ceil_div, power_of_2, require

TILE_WORDS = 2048
"""Words of a program: 128 bytes per thread of 4 warps, where a word has 8. Guess."""

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.int8))


@triton.jit(do_not_specialize=["tokens"])
def kv_move_kernel(
    cache_ptr, piece_ptr, slots_ptr, tokens, layer_words,
    WIDTH: tl.constexpr, PACK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    slot = tl.load(slots_ptr + token, mask=token < tokens, other=0).to(tl.int64)
    held = (token < tokens)[:, None] & (word < WIDTH)[None, :]
    paged = cache_ptr + layer * layer_words + slot[:, None] * WIDTH + word[None, :]
    dense = piece_ptr + (layer * tokens + token)[:, None] * WIDTH + word[None, :]
    if PACK:
        tl.store(dense, tl.load(paged, mask=held), mask=held)  # [BLOCK_TOKENS, BLOCK_WORDS]
    else:
        tl.store(paged, tl.load(dense, mask=held), mask=held)


def plan_kv_move(
    cache: torch.Tensor, piece: torch.Tensor, slots: torch.Tensor, layer_lo: int, *, pack: bool
) -> Launch:
    """From ``cache`` to ``piece``, or back; arguments as in ``kernels.reference.kv_pack``.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit, or the layers do not exist.
    """
    layers, tokens = piece.shape[:2]
    require(
        cache.dim() == piece.dim() + 1
        and cache.shape[3:] == piece.shape[2:]
        and cache.dtype is piece.dtype
        and 0 <= layer_lo <= cache.shape[0] - layers
        and slots.shape == (tokens,)
        and slots.is_contiguous()
        and cache.is_contiguous()
        and piece.is_contiguous(),
        "kv_move",
        *(cache, piece, slots),
    )
    token_bytes = math.prod(cache.shape[3:]) * cache.element_size()
    size, word = next((size, word) for size, word in _WORDS if token_bytes % size == 0)
    width = token_bytes // size
    block_words = min(power_of_2(width), TILE_WORDS)
    block_tokens = TILE_WORDS // block_words
    return Launch(
        kv_move_kernel,
        (ceil_div(tokens, block_tokens), ceil_div(width, block_words), layers),
        {
            "cache_ptr": cache[layer_lo:].flatten().view(word),
            "piece_ptr": piece.flatten().view(word),
            "slots_ptr": slots,
            "tokens": tokens,
            "layer_words": width * cache.shape[1] * cache.shape[2],
        },
        {
            "WIDTH": width,
            "PACK": pack,
            "BLOCK_TOKENS": block_tokens,
            "BLOCK_WORDS": block_words,
        },
    )


def kv_move(
    cache: torch.Tensor, piece: torch.Tensor, slots: torch.Tensor, layer_lo: int, pack: bool
) -> None:
    """``kv_pack`` into a piece that is there, or ``kv_unpack``, of [layers, slots, elements]."""
    plan_kv_move(cache.unsqueeze(2), piece, slots, layer_lo, pack=pack).run()


def kv_pack(cache: torch.Tensor, slots: torch.Tensor, layer_lo: int, layer_hi: int) -> torch.Tensor:
    """See ``kernels.reference.kv_pack.kv_pack``."""
    piece = cache.new_empty(layer_hi - layer_lo, len(slots), *cache.shape[3:])
    plan_kv_move(cache, piece, slots, layer_lo, pack=True).run()
    return piece


def kv_unpack(piece: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, layer_lo: int) -> None:
    """See ``kernels.reference.kv_pack.kv_unpack``."""
    plan_kv_move(cache, piece.contiguous(), slots, layer_lo, pack=False).run()
