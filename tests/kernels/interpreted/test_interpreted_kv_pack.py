"""Triton's KV pack and unpack against the reference: the same bits, and nothing beside them."""

from __future__ import annotations

import pytest
import torch
from interpreted_cases import DTYPES

from kernels.reference import kv_pack as reference
from kernels.triton.kv_pack import kv_pack, kv_unpack


def bits(x: torch.Tensor) -> torch.Tensor:
    """Compared as bytes, NaN payloads and all."""
    return x.view(torch.uint8)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """Every pattern there is, NaNs of all kinds among them."""
    wide = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, wide, dtype=torch.uint8, generator=rng).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "width", "block_tokens", "tokens"),
    [(3, 64, 16, 37), (1, 1, 1, 5), (1, 3, 5, 11), (8, 128, 16, 1), (40, 128, 4, 9), (2, 2, 3, 0)],
)
def test_pack_and_unpack(
    heads: int,
    width: int,
    block_tokens: int,
    tokens: int,
    dtype: torch.dtype,
    rng: torch.Generator,
) -> None:
    blocks = 13
    cache = random_bits((5, blocks, block_tokens, heads, width), dtype, rng)
    slots = torch.randperm(blocks * block_tokens, generator=rng)[:tokens]
    for lo, hi in ((0, 5), (2, 3), (4, 4)):
        piece = kv_pack(cache, slots, lo, hi)
        assert torch.equal(bits(piece), bits(reference.kv_pack(cache, slots, lo, hi)))
        ours, theirs = torch.zeros_like(cache), torch.zeros_like(cache)
        kv_unpack(piece, ours, slots, lo)
        reference.kv_unpack(piece, theirs, slots, lo)
        assert torch.equal(bits(ours), bits(theirs))
        assert torch.equal(bits(kv_pack(ours, slots, lo, hi)), bits(piece))


def test_what_does_not_fit_is_refused() -> None:
    cache, slots = torch.zeros(4, 3, 2, 1, 8), torch.arange(2)
    for piece, lo in (
        (torch.zeros(2, 2, 1, 8), 3),
        (torch.zeros(2, 3, 1, 8), 0),
        (torch.zeros(2, 2, 1, 7), 0),
        (torch.zeros(2, 2, 1, 8).half(), 0),
        (torch.zeros(2, 2, 1, 8), -1),
    ):
        with pytest.raises(ValueError, match="kv_move"):
            kv_unpack(piece, cache, slots, lo)
